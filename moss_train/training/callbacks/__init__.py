"""Callbacks around the training step: metrics, validation, checkpoints, samples, health, summary."""
