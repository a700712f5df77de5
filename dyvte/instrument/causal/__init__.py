"""Causes: what the answer becomes when a path through attention is cut, and what a position says at each layer."""

from dyvte.instrument.causal.groups import GROUPS, find_donors
from dyvte.instrument.causal.knockout import Knockout, all_windows, knockout, windows_of_width
from dyvte.instrument.causal.lens import LogitLens, logit_lens

__all__ = [
    "GROUPS",
    "Knockout",
    "LogitLens",
    "all_windows",
    "find_donors",
    "knockout",
    "logit_lens",
    "windows_of_width",
]
