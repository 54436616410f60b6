"""Training of the tiny teachers: a maker's tool, no part of the installed package."""
