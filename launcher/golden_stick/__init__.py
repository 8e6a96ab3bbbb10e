"""Golden Stick's quant_ckpt.py: its flags, what each becomes, and what its users find afterwards."""
