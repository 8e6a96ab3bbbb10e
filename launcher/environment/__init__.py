"""Who started this process: the variables of torchrun, MindSpore, Slurm and MPI, as one thing."""
