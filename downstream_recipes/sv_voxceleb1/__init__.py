"""The ASV recipe: two configurations."""
