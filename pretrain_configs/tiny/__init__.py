"""The same experiments for a laptop: their difference to ``tiny_model.yaml``."""
