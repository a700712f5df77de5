"""Sets of keys that a knock-out cuts: the objects that an answer rests on, and controls drawn at random."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dyvte.batch import IGNORE_INDEX, Batch
from dyvte.data import Dataset, Sample
from dyvte.instrument.causal.groups import group_masks
from dyvte.instrument.role_attention import Block, Geometry
from dyvte.instrument.sweep.answers import teacher_forced
from dyvte.instrument.views import view
from dyvte.mllm import MLLM
from dyvte.testbed.world import GRID

from ..statistics.bands import generator
from .token_attention import watch_rows

TARGET = "target"
"""Entry of a sample's metadata: cells (row, column) of the drawn scene's grid, those of the objects on the way."""

LOOKED_AT = 16
"""Samples that are read to see whether the data know."""


def knows_targets(dataset: Dataset) -> bool:
    """Whether the data say which objects their answers rest on; the first samples are looked at."""
    for number, sample in enumerate(dataset.readable()):
        if sample.metadata.get(TARGET):
            return True
        if number >= LOOKED_AT:
            break
    return False


def target_keys(mllm: MLLM, batch: Batch, samples: Sequence[Sample], seed: int) -> tuple[Tensor, Tensor]:
    """Visual tokens of the objects that each answer rests on, and as many others of the same image, drawn at random.

    Two masks [B, N]. Rows are empty where the data name no object, where tokens have no place in the image, and where
    the objects cover more than half of it.
    """
    objects, others = (torch.zeros_like(batch.layout.visual) for _ in range(2))
    for row, sample in enumerate(samples):
        cells = sample.metadata.get(TARGET)
        place = view(mllm, batch[row : row + 1]) if cells else None
        if place is None:
            continue
        positions = batch.layout.visual[row].nonzero().flatten()
        number = place.arrange(torch.arange(len(positions)))
        patch_rows, patch_columns = (torch.arange(size) * GRID // size for size in number.shape)
        cell = patch_rows[:, None] * GRID + patch_columns
        named = [int(r) * GRID + int(c) for r, c in cells or ()]
        inside = torch.isin(cell, torch.tensor(named))
        of_objects, elsewhere = number[inside], number[~inside].numpy()
        if len(of_objects) > len(elsewhere):
            continue
        some = generator(seed, f"{sample.id} patches").choice(elsewhere, size=len(of_objects), replace=False)
        objects[row, positions[of_objects]] = True
        others[row, positions[torch.from_numpy(some)]] = True
    return objects, others


def as_many_keys(batch: Batch, ids: Sequence[str], keys: str, seed: int, purpose: str) -> Tensor:
    """As many positions [B, N] of each prompt as a group has, drawn anew for each sample and purpose."""
    wanted = group_masks(batch.layout)[keys]
    drawn = torch.zeros_like(wanted)
    for row, name in enumerate(ids):
        prompt = (~batch.layout.padding[row]).nonzero().flatten().cpu().numpy()
        some = generator(seed, f"{name} {purpose}").choice(prompt, size=int(wanted[row].sum()), replace=False)
        drawn[row, torch.as_tensor(some, device=drawn.device)] = True
    return drawn


def received_by_group(mllm: MLLM, batch: Batch, answers: Tensor, queries: Sequence[str]) -> dict[str, Tensor]:
    """What each position of the prompts receives from a group of queries, without what these give themselves.

    The sum over queries, mean over heads, of attention probabilities: what a cut of the path from these queries to that
    key removes in a layer. Layers that do not attend have 0. Group -> [B, L, N], on the CPU in float32.

    Args:
        answers: [B, A] teacher-forced, -100 at padding; queries that predict a token of theirs are in the group `last`.
        queries: of `dyvte.instrument.causal.GROUPS`.

    Example:
        >>> received = received_by_group(mllm, batch, answers, ["last"])  # doctest: +SKIP
        >>> received["last"][:, 3] @ batch.layout.visual.float().T  # on the image in layer 3  # doctest: +SKIP
    """
    ids = batch["input_ids"]
    place = (torch.arange(ids.shape[1], device=ids.device) + 1).expand_as(ids)  # prompts are rolled: 0 is no prompt
    inputs, _ = teacher_forced(mllm, Batch({**batch, "place": place}, batch.layout), answers)
    place = inputs["place"] * ~inputs.layout.answer
    inputs = Batch({name: value for name, value in inputs.items() if name != "place"}, inputs.layout)
    members = group_masks(inputs.layout)
    # The last token of an answer runs where another one is longer, and predicts nothing.
    behind = torch.arange(place.shape[1], device=ids.device) - inputs.layout.last_prompt[:, None]
    predicts = behind < (answers != IGNORE_INDEX).sum(1, keepdim=True).to(ids.device)
    weights = torch.stack([members[name] & predicts for name in queries], dim=1).float()  # [B, G, N']
    received = torch.zeros(mllm.num_layers, *weights.shape)

    def see(layer: int, geometry: Geometry, rows_of: Callable[[Block], Tensor]) -> None:
        for block in geometry.blocks:
            rows = rows_of(block).mean(1)  # [B, queries, keys]
            itself = torch.arange(weights.shape[-1], device=rows.device)
            rows = rows.masked_fill(itself[block.rows, None] == itself[None, block.columns], 0)
            received[layer][..., block.columns] += (weights[..., block.rows].to(rows) @ rows).float().cpu()

    watch_rows(mllm, inputs, see)
    at_prompt = torch.zeros(mllm.num_layers, len(ids), len(queries), ids.shape[1] + 1)
    at_prompt.scatter_(-1, place.cpu()[None, :, None].expand_as(received), received)
    return {name: at_prompt[:, :, index, 1:].transpose(0, 1) for index, name in enumerate(queries)}


@dataclass(frozen=True)
class EqualMass:
    """Text keys that carry as much attention as the image's do, for each sample and window.

    Attributes:
        keys: [B, W, N] positions of the prompts.
        wanted: [B, W] attention on the image: sum over the window's layers and the queries, mean over heads.
        reached: [B, W] attention on `keys`.
    """

    keys: Tensor
    wanted: Tensor
    reached: Tensor


def equal_mass_keys(
    received: Tensor, batch: Batch, ids: Sequence[str], windows: Sequence[tuple[int, int]], seed: int, purpose: str
) -> EqualMass:
    """Text keys of each prompt, drawn at random, with the attention mass of the image's keys in each window.

    One order of keys a sample, the same for all windows. Where the whole text has less, all of it.

    Args:
        received: [B, L, N] of `received_by_group`.
        windows: [start, stop) of layers.
        purpose: what tells this draw from others.
    """
    visual, padding = batch.layout.visual.cpu(), batch.layout.padding.cpu()
    keys = torch.zeros(len(ids), len(windows), visual.shape[1], dtype=torch.bool)
    wanted, reached = torch.zeros(2, len(ids), len(windows), dtype=torch.float64)
    for row, name in enumerate(ids):
        text = (~visual[row] & ~padding[row]).nonzero().flatten()
        order = torch.from_numpy(generator(seed, f"{name} {purpose}").permutation(text.numpy()))
        for window, (start, stop) in enumerate(windows):
            mass = received[row, start:stop].double().sum(0)
            wanted[row, window] = mass[visual[row]].sum()
            chosen = order[keys_of_mass(mass[order].numpy(), float(wanted[row, window]))]
            keys[row, window, chosen] = True
            reached[row, window] = mass[chosen].sum()
    return EqualMass(keys, wanted, reached)


def keys_of_mass(mass: npt.NDArray[np.float64], wanted: float) -> npt.NDArray[np.intp]:
    """Which keys of `mass` [n], not negative, together have one near to `wanted`, going through them in order.

    A key is taken unless the sum would pass `wanted`; at last one more, if that brings the sum nearer. Keys that
    receive nothing, such as those behind all queries, are left out.

    Example:
        >>> keys_of_mass(np.array([0.4, 0.2, 0.1]), 0.32).tolist()
        [1, 2]
    """
    taken: list[int] = []
    total = 0.0
    for index, each in enumerate(mass):
        if each > 0 and total + each <= wanted:
            taken.append(index)
            total += float(each)
    rest = np.setdiff1d(np.flatnonzero(mass > 0), taken)
    if len(rest):
        nearest = min(rest, key=lambda index: abs(total + mass[index] - wanted))
        if abs(total + mass[nearest] - wanted) < wanted - total:
            taken.append(int(nearest))
    return np.array(taken, dtype=np.intp)
