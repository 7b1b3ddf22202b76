"""The shard format: index, reading, remote folders, codes."""
