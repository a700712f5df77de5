"""Policies that merge visual tokens."""
