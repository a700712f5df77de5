"""Policies by which all visual tokens leave at one layer."""
