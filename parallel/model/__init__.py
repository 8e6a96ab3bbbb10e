"""The decoder: its configuration, the placement of its tensors, and its step."""
