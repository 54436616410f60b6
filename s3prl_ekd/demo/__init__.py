"""The demo: a synthetic corpus, and a full run on it with three tiny teachers."""
