"""Child processes, locks, the terminal, torchrun's environment."""
