"""Packed shards, the training stream that is a function of (seed, position), and the loaders that read it."""
