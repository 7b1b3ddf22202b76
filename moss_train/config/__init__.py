"""Typed configuration: one dataclass per section of every command, built from YAML, command line and Python alike."""
