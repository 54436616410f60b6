"""Analysis of teachers before distillation: sampled frames, layer similarity, plots."""
