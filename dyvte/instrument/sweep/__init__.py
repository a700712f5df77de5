"""Every exit layer from one forward pass, and criteria that name an exit layer from its results."""

from dyvte.instrument.sweep.answers import greedy_answer_ids
from dyvte.instrument.sweep.entropy import ENTROPIES, text_entropies
from dyvte.instrument.sweep.run import ExitSweep, exit_sweep

__all__ = ["ENTROPIES", "ExitSweep", "exit_sweep", "greedy_answer_ids", "text_entropies"]
