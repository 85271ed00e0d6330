"""Metrics, each with direction, range and ideal value, and intervals around them."""
