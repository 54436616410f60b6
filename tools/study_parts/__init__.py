"""Modules of tools/study.py: design, jobs, statistics, report."""
