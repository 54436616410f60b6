"""Teacher targets that are computed once for a corpus and read from disk during training."""
