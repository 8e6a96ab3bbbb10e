"""`prepare`: quantized shards for each rank."""
