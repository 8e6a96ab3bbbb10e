"""compressed-tensors: its `quantization_config` and how its tensors are called and packed."""
