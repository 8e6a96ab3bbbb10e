"""MindFormers' checkpoints: names, ranks and strategies."""
