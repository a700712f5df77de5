"""Operations of prompts, which models of one configuration share: counted once for all the tests of a process."""

from __future__ import annotations

from dyvte.batch import Batch
from dyvte.cost.exit_flops import exit_flops
from dyvte.cost.flops import FlopCount
from dyvte.gates.every_exit import PromptCosts
from dyvte.mllm import MLLM

_COUNTED: dict[tuple[str, int, int], list[FlopCount]] = {}


def counted_once(mllm: MLLM, batch: Batch) -> list[FlopCount]:
    """`exit_flops`, or what it gave for a prompt of these lengths before."""
    lengths = int(batch.layout.text.sum()), int(batch.layout.visual.sum())
    key = (mllm.model.config.to_json_string(), *lengths)
    if key not in _COUNTED:
        _COUNTED[key] = exit_flops(mllm, batch)
    return _COUNTED[key]


def costs_of(mllm: MLLM) -> PromptCosts:
    """`PromptCosts` of a command under test."""
    return PromptCosts(mllm, counted_once)
