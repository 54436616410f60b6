"""The ``ekd_student`` upstream, in the shape of s3prl's ``upstream/<name>/`` folders."""
