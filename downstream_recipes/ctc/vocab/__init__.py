"""Vocabulary files of the PR recipe."""
