"""The method: teachers, aggregation, heads, loss, student. Knows no files, YAML or Runner."""
