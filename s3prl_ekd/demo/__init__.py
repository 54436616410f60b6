"""The embedded default: a synthetic corpus, three tiny teachers, and the run over them."""
