"""Figures as functions of plain data."""
