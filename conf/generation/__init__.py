"""The `generation` group: one YAML for each named choice."""
