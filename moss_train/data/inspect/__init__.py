"""Measure packed audio and report on it."""
