"""Training of the tiny teachers; not part of the installed package."""
