"""Evaluate codecs: metrics, statistics, reports."""
