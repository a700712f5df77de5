"""Timing of what the library promises: `python -m benchmarks.sweep`, ..."""
