"""Start, resume and finish a run."""
