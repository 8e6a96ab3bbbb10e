"""`eval`: perplexity and accuracy, of the original and the quantized model."""
