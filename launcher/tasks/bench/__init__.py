"""`bench`: how fast a checkpoint, or a shape with random weights, runs."""
