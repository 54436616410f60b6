"""The ER recipe: two configurations."""
