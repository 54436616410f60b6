"""Convert a manifest or a public corpus to the files that s3prl's recipes read.

Everything here raises :class:`.DataError` for a corpus that the recipes could not use.
"""
