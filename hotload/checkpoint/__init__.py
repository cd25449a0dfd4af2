"""What a trainer wrote: shards, index, spec and config as values, and the rules they keep."""
