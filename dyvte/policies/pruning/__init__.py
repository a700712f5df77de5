"""Policies that drop some visual tokens."""
