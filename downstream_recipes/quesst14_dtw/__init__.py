"""The QbE recipe: two configurations."""
