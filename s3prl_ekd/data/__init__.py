"""Training data: audio files, length tables, batches and distortions."""
