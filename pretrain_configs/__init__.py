"""YAML files for ``run_pretrain.py -u ekd``; ``s3prl-ekd init`` copies them out."""
