"""Convert a manifest or a public corpus to the files that s3prl's recipes read."""
