"""The `model` group: one YAML for each named choice."""
