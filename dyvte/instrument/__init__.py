"""Measuring what a model does without changing it."""
