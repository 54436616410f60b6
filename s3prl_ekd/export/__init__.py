"""Export students and hidden states to files and folders."""
