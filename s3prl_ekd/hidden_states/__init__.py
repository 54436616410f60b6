"""Hidden states on disk: cached teacher targets, cached downstream features, exported features."""
