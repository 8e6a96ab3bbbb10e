"""Once per run: the configuration, the tasks, and the workers that carry them out."""
