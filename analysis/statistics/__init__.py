"""Statistics of plain arrays and tables."""
