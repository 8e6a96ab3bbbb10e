"""The `task` group: one YAML for each named choice."""
