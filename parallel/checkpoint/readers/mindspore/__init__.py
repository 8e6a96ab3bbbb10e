"""MindSpore's checkpoint files."""
