"""Run folders to one HTML file: `python -m analysis.report`."""
