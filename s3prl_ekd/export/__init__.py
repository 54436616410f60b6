"""What leaves a finished run: students and hidden states as files and folders for others."""
