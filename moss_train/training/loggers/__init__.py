"""Loggers of a run: CSV, progress, TensorBoard, Weights & Biases."""
