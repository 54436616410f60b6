"""A whole study as one command: distillations, the four SUPERB tasks, a report."""
