"""The configuration's YAML files, as a package so that `pkg://conf` works installed or not."""
