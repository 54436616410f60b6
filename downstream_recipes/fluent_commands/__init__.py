"""The IC recipe: two configurations."""
