"""Whether groups of rows run through a decoder layer one after the other, or together in one padded rectangle.

Rows that left their image and rows that still see it need not pad one another, but a second call of a layer dispatches
its operators again. Which of the two takes longer follows from counts: operators and multiply-adds, weighed by how many
floating-point operations a device does while the host dispatches one operator.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dyvte.mllm import MLLM

OPERATORS_OF_CALLS = {1: 76, 2: 147}
"""Operators that a layer behind an exit dispatches when it is called once, and when it is called once for each of two
groups of rows, packing included (of LLaMA; `tests/test_together.py` counts them)."""

FLOPS_PER_OPERATOR = {"cpu": 5e5, "cuda": 1e9}
"""Floating-point operations in the time of one dispatch, by kind of device. CPU: 5.5 microseconds an operator, measured
on a layer that ran on one position, at 87 GFLOP/s, on one core. CUDA: 5 microseconds a launch at 200 TFLOP/s; this one
was not measured."""


def together_is_cheaper(mllm: MLLM, groups: Sequence[Sequence[int]]) -> bool:
    """Whether one call of a decoder layer for all rows takes less time than one for each group.

    A group is given by the positions that each of its rows runs on.

    Example:
        >>> from dyvte.cost.calls import together_is_cheaper
        >>> together_is_cheaper(mllm, [[70, 70], [70]])  # nothing would be padded
        True
        >>> together_is_cheaper(mllm, [[20_000], [70] * 1000])
        False
    """
    rows = [count for group in groups for count in group]
    return _time(mllm, [rows]) < _time(mllm, groups)


def _time(mllm: MLLM, calls: Sequence[Sequence[int]]) -> float:
    """Of a layer that is called for some rows after others, in floating-point operations.

    A CPU dispatches or computes; other devices compute while the host dispatches, so that the longer of both counts.
    """
    weights = sum(each.numel() for each in mllm.layers[0].parameters())
    dispatching = OPERATORS_OF_CALLS[len(calls)] * FLOPS_PER_OPERATOR.get(mllm.device.type, FLOPS_PER_OPERATOR["cuda"])
    computing = 0
    for rows in calls:
        width = max(rows)
        computing += len(rows) * width * (2 * weights + 4 * mllm.hidden_size * width)  # projections; scores and sums
    return dispatching + computing if mllm.device.type == "cpu" else max(dispatching, computing)
