"""The PR recipe: two configurations and the phone vocabulary."""
