"""Corpus tables, audio reading and batching for distillation."""
