"""MindFormers' YAML: what it says of a model and of its quantization. Needs no torch."""
