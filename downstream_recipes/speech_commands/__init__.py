"""The KS recipe: two configurations."""
