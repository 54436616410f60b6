"""Run s3prl's downstream recipes: checks, resume, cached features, noise."""
