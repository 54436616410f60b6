"""What came out of runs: scalars, predictions, tables and plots."""
