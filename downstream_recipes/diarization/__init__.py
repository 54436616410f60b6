"""The SD recipe: two configurations."""
