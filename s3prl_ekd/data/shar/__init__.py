"""lhotse's Shar folders: shards of cuts and their audio, read in sequence (extra ``lhotse``)."""
