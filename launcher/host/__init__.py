"""What this host has and how fast it is: cores, memory, GPUs, and the kernel that suits them."""
