"""The parts of quant_ckpt.py: Golden Stick's flags, and what each becomes."""
