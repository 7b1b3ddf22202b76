"""One training step: objective, schedule, optimizers, update."""
