"""The ASR recipe: two configurations and the character dictionary."""
