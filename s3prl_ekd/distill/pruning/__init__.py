"""The pruned student: joint distillation and structured pruning (DPHuBERT, arXiv 2305.17651)."""
