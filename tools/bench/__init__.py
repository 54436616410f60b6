"""Measurements for the makers of s3prl_ekd."""
