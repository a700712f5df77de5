"""Finds intervals of zero width in what a command has written."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

SIDES = (("low", "high"), ("lower", "upper"))
AT_A_LIMIT = (0.0, 1.0)
RANKS = ("peak_looking", "peak_writing", "boundaries")
"""Layers of a mean curve: whole numbers, which all draws of images may agree on."""
COUNTS_OF_HEADS = ("looking", "looking_overall", "carrying", "fall", "rise", "rank_correlation")
"""Shares of heads, or of pairs of layers, of a mean curve: as layers, except for all and none."""
REGISTERED = ("slope", "steps", "means")
"""Of gate claims, whose rules were fixed with these intervals: exit layers of gates that may not respond at all."""


def _flat(low: Any, high: Any, of: str) -> bool:
    """Whether an interval, or one among many, has no width."""
    if of in RANKS or of in REGISTERED:
        return False
    low, high = np.broadcast_arrays(
        *(
            np.asarray([each], dtype=np.float64) if each is None else np.asarray(each, np.float64)
            for each in (low, high)
        )
    )
    flat = low == high
    return bool((flat & np.isin(low, AT_A_LIMIT) if of in COUNTS_OF_HEADS else flat).any())


def _in_summary(value: Any, place: str, of: str = "") -> Iterator[str]:
    if isinstance(value, list):
        for index, each in enumerate(value):
            yield from _in_summary(each, f"{place}[{index}]", of)
    if not isinstance(value, dict):
        return
    for low, high in SIDES:
        if value.get(low) is not None and value.get(high) is not None and _flat(value[low], value[high], of):
            yield place
    for name, each in value.items():
        measure = name.removesuffix("_ci")
        pair = measure != name and isinstance(each, list) and len(each) == 2 and None not in each
        if pair and _flat(*each, measure):
            yield f"{place}.{name}"
        yield from _in_summary(each, f"{place}.{name}", name)


def intervals_of_zero_width(folder: Path) -> list[str]:
    """Every interval in the csv tables and summaries below a folder that has no width, by its place.

    Read as intervals: columns or keys `low` and `high`, `lower` and `upper`, also behind a name and `_`, and `NAME_ci`.
    An interval that is left out (empty, null) claims nothing and is none.
    """
    found = []
    for file in sorted(folder.rglob("*.csv")):
        try:
            table = pd.read_csv(file)
        except pd.errors.EmptyDataError:
            continue
        columns = [str(name) for name in table]
        for low, high in SIDES:
            for column in (name for name in columns if name == low or name.endswith(f"_{low}")):
                other = f"{column[: -len(low)]}{high}"
                of = column[: -len(low) - 1] or columns[columns.index(column) - 1]
                if other in columns and _flat(table[column], table[other], of):
                    found.append(f"{file.relative_to(folder)}: {column}")
    for file in sorted(folder.rglob("summary.json")):
        found += _in_summary(json.loads(file.read_text()), str(file.relative_to(folder)))
    return found
