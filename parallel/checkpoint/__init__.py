"""Checkpoints: reading, planning, sharding and storing them. The only importer of safetensors."""
