"""Generation: the KV cache, sampling, and the loop of prefill and decode."""
