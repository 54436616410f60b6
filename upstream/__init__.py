"""The ``ekd_student`` upstream, laid out like s3prl's ``upstream/NAME/`` folders."""
