"""Meta's consolidated files."""
