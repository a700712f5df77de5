"""Experiments on top of :mod:`dyvte`: each module is a Hydra command that writes tables, figures and a summary."""
