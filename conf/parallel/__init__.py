"""The `parallel` group: one YAML for each named choice."""
