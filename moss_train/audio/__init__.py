"""Audio files and signal transforms."""
