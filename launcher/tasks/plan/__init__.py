"""`plan`: what each rank will hold, and which sizes work. Needs no torch."""
