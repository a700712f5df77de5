"""Operations of a prefill under every exit, from two passes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from dyvte.batch import Batch
    from dyvte.mllm import MLLM
from dyvte.cost.flops import FlopCount, FlopCounter, layer_tally
from dyvte.instrument.hooks import every_position


def exit_flops(mllm: MLLM, batch: Batch) -> list[FlopCount]:
    """Count one prefill of a batch under every exit k = 0..L.

    Two passes are enough, since a layer's cost depends on its own positions only: the full model gives the cost of
    each layer with visual tokens, exit 0 its cost without them. All layers run on all positions that are left, as they
    do under a policy; Gemma 4 E by itself runs its last layers on the prompt's last token only.

    Example:
        >>> costs = dyvte.exit_flops(mllm, batch)
        >>> costs[0].total < costs[6].total < costs[12].total
        True
    """
    from dyvte.policies.exits.fixed_exit import FixedExit  # policies count their own overhead with this module

    full, with_visual = _prefill_layer_flops(mllm, batch)
    with FixedExit(layer=0)(mllm):
        _, text_only = _prefill_layer_flops(mllm, batch)
    counts = [full]
    for seeing, blind in zip(reversed(with_visual), reversed(text_only), strict=True):
        saved = seeing - blind
        counts.append(FlopCount(counts[-1].total - saved, counts[-1].decoder - saved))
    return counts[::-1]


@torch.no_grad()
def _prefill_layer_flops(mllm: MLLM, batch: Batch) -> tuple[FlopCount, list[int]]:
    """`prefill_flops`, and the part of every decoder layer in it."""
    with every_position(mllm), FlopCounter(mllm) as counter, layer_tally(mllm, counter) as layers:
        mllm.model(**batch, use_cache=True, logits_to_keep=1)
    return counter.count, layers
