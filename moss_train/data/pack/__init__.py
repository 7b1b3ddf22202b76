"""Pack audio files into shards."""
