"""What tools/study.py is made of: design, parts that are run, numbers, report."""
