"""The `quant` group: one YAML for each named choice."""
