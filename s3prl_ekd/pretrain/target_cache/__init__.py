"""Teacher targets computed once for a corpus and read from disk in every later step."""
