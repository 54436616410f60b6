"""Looking at teachers before distilling them: sampled frames, statistics, plots."""
