"""SUPERB: run the tasks, collect the results, and report them."""
