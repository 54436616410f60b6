"""Benchmark of a distillation step, beside s3prl's way of making it: ``python -m tools.bench``."""
