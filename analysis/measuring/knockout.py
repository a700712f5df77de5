"""Every path, window and replacement of some samples, as tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from omegaconf import DictConfig
from torch import Tensor

from dyvte.batch import Batch
from dyvte.data import Sample
from dyvte.data.base import image_numbers
from dyvte.data.metrics import exact_match
from dyvte.errors import ConfigError
from dyvte.instrument.causal import GROUPS, all_windows, find_donors, knockout, windows_of_width
from dyvte.instrument.sweep import greedy_answer_ids
from dyvte.mllm import MLLM

from ..statistics.bands import long_table
from ..statistics.segments import MIN_STAGE_LAYERS, registered_split, stage_splits
from ..statistics.stage_table import cuts_of_split
from .key_sets import EqualMass, as_many_keys, equal_mass_keys, received_by_group, target_keys
from .runs import columns_of

ZHANG_WIDTH = 9 / 32
"""Share of the layers in a window of Zhang et al. 2024 (arXiv 2411.18620)."""


@dataclass(frozen=True)
class Cut:
    """One line of the figures: a path, and what happens to it.

    Attributes:
        what: "cut", "mean", "swap", "random" for as many random keys in place of the path's, "mass" for random text
            keys that get as much attention as the image's, "objects" for the patches of the objects that the answer
            rests on, "other patches" for as many random ones of the same image.
    """

    queries: str
    keys: str
    what: str

    @property
    def name(self) -> str:
        """As in tables and `summary.json`."""
        return f"{self.queries}->{self.keys}" + ("" if self.what == "cut" else f" ({self.what})")

    @property
    def mode(self) -> str:
        """Of `dyvte.knockout`: "cut" where other keys than the path's are."""
        return self.what if self.what in REPLACEMENTS else "cut"


OF_THE_IMAGE = ("objects", "other patches")
REPLACEMENTS = ("mean", "swap")


def cuts_of(cfg: DictConfig, objects: bool = False) -> list[Cut]:
    """What a configuration asks for, controls behind the paths; with `objects` also those that answers rest on."""
    paths = [tuple(path) for path in cfg.paths]
    if not paths:
        raise ConfigError("paths is empty: give one or more, for instance paths=[[instruction,visual]]")
    for path in paths:
        if len(path) != 2 or not set(path) <= set(GROUPS):
            raise ConfigError(f"paths: {list(path)} is not [queries, keys] from {', '.join(GROUPS)}")
    if unknown := set(cfg.replace) - set(REPLACEMENTS):
        raise ConfigError(f"replace: {min(unknown)!r} is neither mean nor swap")
    of_the_image = [*cfg.replace, *(OF_THE_IMAGE if objects else ())]
    # The image's own queries see next to no text that could stand in for the image.
    looking = [queries for queries, keys in paths if keys == "visual" and queries != "visual"]
    return [
        *(Cut(queries, keys, "cut") for queries, keys in paths),
        *(Cut("instruction", "visual", what) for what in of_the_image),
        *(Cut(queries, keys, "random") for queries, keys in paths if cfg.control),
        *(Cut(queries, "visual", "mass") for queries in looking if cfg.control and cfg.equal_mass),
    ]


def windows_to_cut(cfg: DictConfig, num_layers: int) -> list[tuple[int, int]]:
    """The windows [start, stop) that a configuration asks for: those named, or all of one width."""
    if cfg.windows is None:
        width = max(1, round(ZHANG_WIDTH * num_layers)) if cfg.width is None else cfg.width
        return windows_of_width(num_layers, width)
    if cfg.width is not None:
        raise ConfigError("give width or windows, not both")
    named = [tuple(window) for window in cfg.windows]
    for window in named:
        if len(window) != 2 or not 0 <= window[0] < window[1] <= num_layers:
            raise ConfigError(f"windows: {list(window)} is not [start, stop) with 0 <= start < stop <= {num_layers}")
    if not named:
        raise ConfigError("windows is empty: give one or more, for instance windows=[[0,5]], or null")
    return named


def splits_of(cfg: DictConfig, num_layers: int) -> list[tuple[int, int]]:
    """The splits that the stage table is to be made for; none where the decoder is too short for three stages."""
    possible = [tuple(split) for split in stage_splits(num_layers).tolist()]
    if cfg.splits is None:
        return [registered_split(num_layers)] if possible else []
    for split in cfg.splits:
        if tuple(split) not in possible:
            raise ConfigError(
                f"splits: {list(split)} does not cut {num_layers} layers into three stages of at least "
                f"{MIN_STAGE_LAYERS} layers"
            )
    return [tuple(split) for split in cfg.splits]


@dataclass
class KnockoutMeasurement:
    """Turns a batch's samples into the tables `samples`, `knockouts`, `equal_mass`, `stage_cuts` and `entry_exit`."""

    mllm: MLLM
    cuts: list[Cut]
    windows: list[tuple[int, int]]
    splits: list[tuple[int, int]]
    entry_exit: bool
    max_new_tokens: int
    branch_tokens: int | None
    seed: int

    @classmethod
    def of(cls, mllm: MLLM, cfg: DictConfig, objects: bool = False) -> KnockoutMeasurement:
        """The measurement that a configuration asks for; `objects` if the data know what answers rest on."""
        windows, cuts = windows_to_cut(cfg, mllm.num_layers), cuts_of(cfg, objects)
        splits = splits_of(cfg, mllm.num_layers)
        return cls(mllm, cuts, windows, splits, cfg.entry_exit, cfg.max_new_tokens, cfg.branch_tokens, cfg.seed)

    @property
    def of_equal_mass(self) -> bool:
        """Whether text keys that get as much attention as the image's are cut in their place."""
        return any(cut.what == "mass" for cut in self.cuts)

    @torch.no_grad()
    def __call__(self, samples: list[Sample]) -> dict[str, pd.DataFrame]:
        """The tables of one batch."""
        batch = self.mllm.encode([sample.image for sample in samples], [sample.question for sample in samples])
        answers = greedy_answer_ids(self.mllm, batch, self.max_new_tokens)
        text = self.mllm.decode([[token for token in row if token >= 0] for row in answers.tolist()])
        ids = [sample.id for sample in samples]
        equal = self._equal_mass(ids, batch, answers)
        right = [
            None if sample.answer is None else exact_match(answer, sample.answer)
            for answer, sample in zip(text, samples, strict=True)
        ]
        of_samples = {
            **columns_of(samples, "id", "image_id", "kind", "question"),
            "reference": [sample.answer for sample in samples],
            "answer": text,
            "right": pd.array(right, dtype="boolean"),
            "visual_tokens": batch.layout.visual.sum(1).tolist(),
        }
        found = {
            "samples": pd.DataFrame(of_samples),
            "knockouts": self._knockouts(samples, batch, answers, {name: each.keys for name, each in equal.items()}),
        }
        if equal:
            found["equal_mass"] = _masses(ids, equal, self.windows)
        if self.splits:
            found["stage_cuts"] = self._stage_cuts(samples, batch, answers)
        if self.entry_exit:
            windows = all_windows(self.mllm.num_layers)
            table = self._table(samples, batch, answers, [("instruction", "visual")], windows, invert=True)
            found["entry_exit"] = table.drop(columns=["cut", "window"])
        return found

    def _table(
        self,
        samples: Sequence[Sample],
        batch: Batch,
        answers: Tensor,
        paths: list[tuple[str, str]],
        windows: Sequence[tuple[int, int]],
        mode: Any = "cut",
        **how: Any,
    ) -> pd.DataFrame:
        """One row a sample, path (`cut` is its number) and window.

        Samples that have no other image to swap with are left out, as their rows would say nothing.
        """
        ids = [sample.id for sample in samples]
        donors = find_donors(batch.layout, [sample.image_id for sample in samples]) if mode == "swap" else None
        how |= {"shared_image": image_numbers(samples), "branch_tokens": self.branch_tokens}
        how |= {"mode": mode, "donors": donors, "keep_logits": False}
        found = knockout(self.mllm, batch, answers, paths, windows, **how).up_to_ties()
        effects = {
            "agree": found.agree.cpu(),
            "nats": found.log_probability_change.float().cpu(),
            "first_percent": found.first_token_change.float().cpu(),
        }
        table = _with_limits(long_table({"id": ids}, effects, "cut", "window"), windows)
        return table[~table["id"].isin([ids[row] for row, donor in enumerate(donors or ()) if donor == row])]

    def _equal_mass(self, ids: Sequence[str], batch: Batch, answers: Tensor) -> dict[str, EqualMass]:
        """The keys that are cut in place of the image's, by the cut's name."""
        asked = [each for each in self.cuts if each.what == "mass"]
        if not asked:
            return {}
        received = received_by_group(self.mllm, batch, answers, [each.queries for each in asked])
        return {
            each.name: equal_mass_keys(received[each.queries], batch, ids, self.windows, self.seed, each.name)
            for each in asked
        }

    def _knockouts(
        self, samples: list[Sample], batch: Batch, answers: Tensor, equal_mass: dict[str, Tensor]
    ) -> pd.DataFrame:
        ids = [sample.id for sample in samples]
        random = [each for each in self.cuts if each.what == "random"]
        sets = {each.name: as_many_keys(batch, ids, each.keys, self.seed, each.name) for each in random} | equal_mass
        of_image = {each.what: index for index, each in enumerate(self.cuts) if each.what in OF_THE_IMAGE}
        unknown: list[str] = []  # samples whose objects are: their rows of these would say nothing
        if of_image:
            masks = target_keys(self.mllm, batch, samples, self.seed)
            unknown = [name for name, found in zip(ids, masks[0].any(1).tolist(), strict=True) if not found]
            sets |= {self.cuts[of_image[what]].name: mask for what, mask in zip(OF_THE_IMAGE, masks, strict=True)}
        tables = []
        for mode in ("cut", *REPLACEMENTS):
            indices = [index for index, each in enumerate(self.cuts) if each.mode == mode]
            if indices:
                chosen = [self.cuts[index] for index in indices]
                paths = [(each.queries, each.name if each.name in sets else each.keys) for each in chosen]
                own_sets = sets if mode == "cut" else {}
                table = self._table(samples, batch, answers, paths, self.windows, mode, key_sets=own_sets)
                tables.append(table.assign(cut=np.array(indices)[table["cut"]]))
        joined = pd.concat(tables)
        joined = joined[~(joined["id"].isin(unknown) & joined["cut"].isin(of_image.values()))].reset_index(drop=True)
        joined.insert(2, "name", [self.cuts[index].name for index in joined["cut"]])
        return joined

    def _stage_cuts(self, samples: list[Sample], batch: Batch, answers: Tensor) -> pd.DataFrame:
        """What the stage table asks for at each split."""
        asked = dict.fromkeys(cut for split in self.splits for cut in cuts_of_split(split, self.mllm.num_layers))
        windows_of: dict[tuple[str, str], list[tuple[int, int]]] = {}
        for path, what, window in asked:
            windows_of.setdefault((path, what), []).append(window)
        tables = []
        for (path, what), windows in windows_of.items():
            queries, keys = path.split("->")
            table = self._table(samples, batch, answers, [(queries, keys)], windows, what)
            table = table.drop(columns=["cut", "window"])
            table.insert(1, "name", Cut(queries, keys, what).name)
            tables.append(table)
        return pd.concat(tables, ignore_index=True)


def _masses(ids: Sequence[str], found: dict[str, EqualMass], windows: Sequence[tuple[int, int]]) -> pd.DataFrame:
    """One row a sample, cut and window: attention on the image, on the keys cut in its place, and their number."""
    tables = []
    for name, each in found.items():
        values = {"image_mass": each.wanted, "mass": each.reached, "num_keys": each.keys.sum(-1)}
        tables.append(long_table({"id": ids, "name": [name] * len(ids)}, values, "window"))
    return _with_limits(pd.concat(tables, ignore_index=True), windows)


def _with_limits(table: pd.DataFrame, windows: Sequence[tuple[int, int]]) -> pd.DataFrame:
    """With the layers of every row's window."""
    starts, stops = np.array(windows)[table["window"]].T
    return table.assign(start=starts, stop=stops)
