"""The method: teachers, aggregation, heads, loss, student. Needs no files, YAML or Runner."""
