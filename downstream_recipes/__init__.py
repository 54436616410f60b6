"""YAML and small data files for ``run_downstream.py``; ``s3prl-ekd init`` copies them out."""
