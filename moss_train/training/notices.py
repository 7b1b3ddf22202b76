"""Warnings to the person who watches a run: one plain line each, without a place in the source code."""

import sys


def warn(message: str) -> None:
    """Print a warning to stderr."""
    print(f"warning: {message}", file=sys.stderr, flush=True)
