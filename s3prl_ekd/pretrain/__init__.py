"""Train the student: settings, data, steps, checkpoints."""
