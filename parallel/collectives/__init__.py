"""Groups of processes: over shared memory on one host, over a network, and over both."""
