"""Parts of zoo_scores.py: results of superb with intervals over seeds and utterances."""
