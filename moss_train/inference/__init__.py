"""Encode files and corpora to codes, and decode them."""
