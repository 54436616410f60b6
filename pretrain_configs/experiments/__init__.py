"""One YAML for each experiment: its difference to ``config_model.yaml``."""
