"""Processes, terminal and locks."""
