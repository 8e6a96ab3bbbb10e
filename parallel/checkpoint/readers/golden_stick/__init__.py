"""Golden Stick's quantized files."""
