"""Configuration: its schema, and the builder of `_target_` nodes."""
