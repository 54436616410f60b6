"""Metrics of SUPERB's tasks, computed from the prediction files that s3prl leaves."""
