"""Codecs that can be evaluated."""
