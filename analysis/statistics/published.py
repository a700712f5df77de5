"""Numbers that papers print, beside a run's own."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from omegaconf import DictConfig

from dyvte.errors import ConfigError
from dyvte.runs.config import config_folder

from .markdown import markdown_table

NOT_BENCHMARKS = ("method", "tokens", "source")
UNPRUNED = 576
"""Visual tokens of LLaVA-1.5, of which the tables' 192, 128 and 64 are left."""


def published_pruning(tokens: int) -> pd.DataFrame:
    """What papers print for LLaVA-1.5-7B at so many visual tokens, one row a method and source; and for all 576.

    Columns are `method` (as the tables here call it), `tokens`, one a benchmark (percent; MME in points, of perception
    alone as MME-P), and `source`.
    """
    table = pd.read_csv(config_folder() / "published" / "llava15_7b.csv")
    if tokens not in set(table["tokens"]) - {UNPRUNED}:
        known = sorted(set(table["tokens"]) - {UNPRUNED}, reverse=True)
        raise ConfigError(f"experiment.published_tokens: papers print {known}, not {tokens}")
    return table[table["tokens"].isin([tokens, UNPRUNED])].reset_index(drop=True)


def beside(experiment: DictConfig, label: str) -> str:
    """What papers print for a method on `experiment.benchmark`: the lowest and highest, and of how many sources."""
    table = published_pruning(experiment.published_tokens)
    names = [name for name in table.columns if name not in NOT_BENCHMARKS]
    if experiment.benchmark not in names:
        raise ConfigError(f"experiment.benchmark is one of {', '.join(names)}, got {experiment.benchmark}")
    found = table.loc[table["method"] == label, experiment.benchmark].dropna()
    if found.empty:
        return "–"
    if len(found) == 1:
        return f"{found.iloc[0]:g}"
    return f"{found.min():g} to {found.max():g} ({len(found)} sources)"


def published_page(experiment: DictConfig) -> list[str]:
    """Lines of a page: the published table, its sources numbered below."""
    if experiment.published_tokens is None:
        return []
    table = published_pruning(experiment.published_tokens)
    sources: Sequence[str] = list(dict.fromkeys(table["source"]))
    names = [name for name in table.columns if name not in NOT_BENCHMARKS and table[name].notna().any()]
    rows = [
        [
            row["method"],
            row["tokens"],
            *("" if pd.isna(row[name]) else f"{row[name]:g}" for name in names),
            f"[{sources.index(row['source']) + 1}]",
        ]
        for row in table.to_dict("records")
    ]
    return [
        "",
        f"Published for LLaVA-1.5-7B at {experiment.published_tokens} of {UNPRUNED} visual tokens. What papers count "
        "as so many tokens differs (before the decoder, or the mean over its layers), and so do their evaluations; "
        "only rows of one source can be compared:",
        "",
        *markdown_table(["method", "tokens", *names, "source"], rows),
        "",
        *(f"[{number}] {source}.  " for number, source in enumerate(sources, 1)),
    ]
