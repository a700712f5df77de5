"""Finds intervals of zero width in what a command has written."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

SIDES = (("low", "high"), ("lower", "upper"))
AT_A_LIMIT = (0.0, 1.0, 100.0, -100.0)
"""Where a rate, in parts or in percentage points, shows nothing of how it varies."""
NO_RATES = ("kl", "kl_reverse", "exit_depth", "depth", "step", "difference", "peak_looking", "peak_writing", "tokens")
"""Nats, which are 0 where a model is compared with itself; layers (`tokens`: at which each answer token is decided);
and differences of entropies."""


def _flat(low: Any, high: Any) -> bool:
    """Whether an interval, or one among many, has no width at 0 or 1."""
    low, high = np.broadcast_arrays(np.asarray(low, dtype=np.float64), np.asarray(high, dtype=np.float64))
    return bool(((low == high) & np.isin(low, AT_A_LIMIT)).any())


def _in_summary(value: Any, place: str) -> Iterator[str]:
    if isinstance(value, list):
        for index, each in enumerate(value):
            yield from _in_summary(each, f"{place}[{index}]")
    if not isinstance(value, dict):
        return
    for low, high in SIDES:
        if value.get(low) is not None and value.get(high) is not None and _flat(value[low], value[high]):
            yield place
    for name, each in value.items():
        if name.endswith("_ci") and isinstance(each, list) and len(each) == 2 and None not in each and _flat(*each):
            yield f"{place}.{name}"
        if name not in NO_RATES:
            yield from _in_summary(each, f"{place}.{name}")


def intervals_of_zero_width(folder: Path) -> list[str]:
    """Every interval in the csv tables and summaries below a folder that has no width at 0 or 1, by its place.

    Read as intervals: columns or keys `low` and `high`, `lower` and `upper`, also behind a name and `_`, and `NAME_ci`.
    """
    found = []
    for file in sorted(folder.rglob("*.csv")):
        try:
            table = pd.read_csv(file)
        except pd.errors.EmptyDataError:
            continue
        if "measure" in table:
            table = table[~table["measure"].isin(NO_RATES)]
        columns = [str(name) for name in table]
        for low, high in SIDES:
            for column in (name for name in columns if name == low or name.endswith(f"_{low}")):
                other = f"{column[: -len(low)]}{high}"
                of = column[: -len(low) - 1] or columns[columns.index(column) - 1]
                if not of.endswith(NO_RATES) and other in columns and _flat(table[column], table[other]):
                    found.append(f"{file.relative_to(folder)}: {column}")
    for file in sorted(folder.rglob("summary.json")):
        found += _in_summary(json.loads(file.read_text()), str(file.relative_to(folder)))
    return found
