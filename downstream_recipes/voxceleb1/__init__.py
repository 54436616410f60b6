"""The SID recipe: two configurations."""
