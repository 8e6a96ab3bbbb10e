"""Quantization methods: one file, one method."""
