"""The training stream, a function of (seed, position), and the loaders that read it."""
