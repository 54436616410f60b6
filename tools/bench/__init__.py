"""Benchmark of a distillation step against s3prl's distiller: ``python -m tools.bench``."""
