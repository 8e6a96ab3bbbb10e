"""The products of activations with quantized weights, one file a path."""
