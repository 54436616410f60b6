"""From a corpus as people have it to the files that s3prl's recipes read."""
