"""Adapters to the evaluation frameworks of others."""
