"""The tables of an exits run, summarised by group of samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from omegaconf import DictConfig

from dyvte.instrument.sweep import ENTROPIES
from dyvte.runs import store

from . import exits as exit_statistics
from .bands import (
    Array,
    Band,
    cluster_bootstrap,
    cluster_mean,
    count_images,
    mean_band,
    percentile_band,
)
from .exits import Finding

QUESTIONS, CAPTIONS, TEXT_ONLY = "questions", "captions", "text_only"
"""Parts of the data: findings are about questions on images; captions and questions without image are kept apart."""
LEVEL = 0.95
CURVES = {"accuracy": "correct", "agreement": "agree", "kl": "kl", "kl_reverse": "kl_reverse", "nll": "nll"}
"""What is reported for every exit and group of questions, with its column in the table `exits`."""

FLOPS = ("flops_total", "flops_decoder")


def after_exit(num_layers: int) -> npt.NDArray[np.bool_]:
    """[L + 1, L] where E[k, l] is defined: l >= k, and every layer of the full model (k = L)."""
    exits, layers = np.arange(num_layers + 1)[:, None], np.arange(num_layers)
    return (layers >= exits) | (exits == num_layers)


# ----------------------------------------------------------------------- summarising


@dataclass(frozen=True)
class Results:
    """The tables of a run as arrays. n samples, L layers.

    Attributes:
        samples: n rows.
        exits: column -> `[n, L + 1]`.
        entropies: name -> E[k, l] of each sample, `[n, L + 1, L]`; NaN where exit k is still to come.
    """

    samples: pd.DataFrame
    exits: dict[str, Array]
    entropies: dict[str, Array]

    @classmethod
    def read(cls, folder: store.RunFolder) -> Results:
        """From the run folder."""
        samples, exits, entropy = (folder.read_table(name) for name in ("samples", "exits", "entropy"))
        columns = {name: exits[name] for name in exits.columns if name not in ("id", "exit_layer", "answer")}
        arrays = {
            name: column.to_numpy(np.float64, na_value=np.nan).reshape(len(samples), -1)
            for name, column in columns.items()
        }
        num_layers = arrays["agree"].shape[1] - 1
        entropies = {}
        for name in ENTROPIES:
            entropies[name] = np.full((len(samples), num_layers + 1, num_layers), np.nan)
            entropies[name][:, after_exit(num_layers)] = entropy[name].to_numpy(np.float64).reshape(len(samples), -1)
        return cls(samples, arrays, entropies)

    def where(self, mask: npt.NDArray[np.bool_]) -> Results:
        """Some of the samples."""
        return Results(
            self.samples[mask],
            {name: values[mask] for name, values in self.exits.items()},
            {name: values[mask] for name, values in self.entropies.items()},
        )

    @property
    def images(self) -> npt.NDArray[Any]:
        """`[n]` image of each sample."""
        return self.samples["image_id"].to_numpy()

    @property
    def num_layers(self) -> int:
        """L."""
        return self.exits["agree"].shape[1] - 1


def curves_of(results: Results, cfg: DictConfig) -> dict[str, Band]:
    """Mean of every measure at every exit with its band; accuracy is NaN without reference answers."""
    return {
        name: mean_band(results.exits[column], results.images, LEVEL, cfg.bootstrap, cfg.seed)
        for name, column in CURVES.items()
    }


def first_finding(results: Results, cfg: DictConfig, level: float = LEVEL) -> Finding:
    """Finding 1 on these samples."""
    return exit_statistics.contribution_stops(
        results.exits["correct"],
        results.exits["agree"],
        results.exits["logit_change"],
        results.images,
        max_loss=cfg.findings.max_loss,
        min_gain=cfg.findings.min_gain,
        level=level,
        n_boot=cfg.bootstrap,
        seed=cfg.seed,
    )


@dataclass(frozen=True)
class Group:
    """A group of questions: all, one kind, or those that need the image."""

    results: Results
    curves: dict[str, Band]
    depth: Band
    stops: Finding

    @classmethod
    def of(cls, results: Results, cfg: DictConfig, level: float = LEVEL) -> Group:
        """Curves, exit depth and finding 1 of these samples; `level` is the finding's."""
        depth = mean_band(results.samples["exit_depth"], results.images, LEVEL, cfg.bootstrap, cfg.seed)
        return cls(results, curves_of(results, cfg), depth, first_finding(results, cfg, level))

    def summary(self) -> dict[str, Any]:
        """What `summary.json` says about it."""
        results, depths = self.results, self.results.samples["exit_depth"]
        entropy = results.entropies["text_entropy"]
        return {
            "num_samples": len(depths),
            "num_images": count_images(results.images),
            **{name: self.curves[name].mean for name in ("accuracy", "agreement", "kl")},
            **{name: cluster_mean(results.exits[name]) for name in FLOPS},
            "bands": {name: band.to_dict() for name, band in self.curves.items()},
            "exit_depth": {
                **self.depth.to_dict(),
                "counts": np.bincount(depths, minlength=results.num_layers + 1),
                "lucky_mean": results.samples["lucky_exit_depth"].mean(),
            },
            "text_entropy": cluster_mean(entropy),
            "text_entropy_difference": cluster_mean(entropy - entropy[:, -1:]),
            "stops": self.stops.to_dict(),
        }


def entropy_summary(results: Results, cfg: DictConfig) -> dict[str, Any]:
    """E[k, l] and E[k, l] - E[L, l], means over samples, with a band around the difference."""
    summary = {}
    for name, entropy in results.entropies.items():
        change = mean_band(entropy - entropy[:, -1:], results.images, LEVEL, cfg.bootstrap, cfg.seed)
        mean = mean_band(entropy, results.images, LEVEL, cfg.bootstrap, cfg.seed)
        summary[name] = {"matrix": mean.to_dict(), "difference": change.to_dict()}
    return summary


def token_curves(tokens: pd.DataFrame) -> pd.DataFrame:
    """Agreement and negative log-likelihood by index of the answer token and exit layer, for each part of the data."""
    keys = ["part", "token", "exit_layer"]
    return tokens.groupby(keys, as_index=False).agg(
        agreement=("agree", "mean"), nll=("nll", "mean"), num_answers=("id", "size")
    )


def token_depths(tokens: pd.DataFrame) -> pd.DataFrame:
    """For every answer token the first exit layer from which it is predicted, given the answer before it.

    Returns:
        Columns `id`, `part`, `image_id`, `token`, `depth`.
    """
    ordered = tokens.sort_values(["id", "token", "exit_layer"], kind="stable")
    num_exits = int(ordered["exit_layer"].max()) + 1
    wrong = 1 - ordered["agree"].to_numpy(np.float64).reshape(-1, num_exits)
    wrong[:, -1] = 0.0  # the full model agrees with itself, up to ties
    first = ordered.iloc[::num_exits]
    depth = exit_statistics.settled_layer(wrong, 0.5)
    return first[["id", "part", "image_id", "token"]].assign(depth=depth).reset_index(drop=True)


def token_summary(depths: pd.DataFrame, cfg: DictConfig, least: int = 10) -> dict[str, Any]:
    """Mean depth by index of the answer token for questions and captions, and how far their whole answers differ.

    Indices that fewer than `least` answers reach are left out, and captions if there are fewer.
    """
    summary: dict[str, Any] = {}
    first_tokens = depths.loc[depths["token"] == 0, "part"].value_counts()
    parts = [part for part in (QUESTIONS, CAPTIONS) if first_tokens.get(part, 0) >= least]
    for part in parts:
        of_part = depths[depths["part"] == part]
        of_index = {index: rows for index, rows in of_part.groupby("token") if len(rows) >= least}
        bands = [
            mean_band(rows["depth"], rows["image_id"].to_numpy(), LEVEL, cfg.bootstrap, cfg.seed)
            for rows in of_index.values()
        ]
        summary[part] = {
            "token": list(of_index),
            "num_answers": [len(rows) for rows in of_index.values()],
            **{name: [float(getattr(band, name)) for band in bands] for name in ("mean", "low", "high")},
        }
    if len(parts) == 2:
        whole = depths.groupby(["id", "part", "image_id"], as_index=False)["depth"].max()  # every token is predicted
        in_part = whole["part"].to_numpy()[:, None] == [CAPTIONS, QUESTIONS]
        values = np.where(in_part, whole["depth"].to_numpy()[:, None], np.nan)
        replicates = cluster_bootstrap(values, whole["image_id"].to_numpy(), cfg.bootstrap, cfg.seed)
        means = cluster_mean(values)
        for index, part in enumerate((CAPTIONS, QUESTIONS)):
            summary[part]["whole_answer"] = percentile_band(means[index], replicates[:, index], LEVEL).to_dict()
        summary["captions_minus_questions"] = percentile_band(means @ [1, -1], replicates @ [1, -1], LEVEL).to_dict()
    return summary


def long_table(groups: Mapping[str, Group]) -> pd.DataFrame:
    """Every curve of every group of questions, one row per exit layer."""
    return pd.concat(
        [
            pd.DataFrame(
                {
                    "group": name,
                    "num_samples": len(group.results.samples),
                    "measure": measure,
                    "exit_layer": np.arange(len(band.mean)),
                    **band.to_dict(),
                }
            )
            for name, group in groups.items()
            for measure, band in group.curves.items()
        ],
        ignore_index=True,
    )


def entropy_long_table(summary: Mapping[str, Any]) -> pd.DataFrame:
    """E[k, l] and its difference from the full model, one row per exit layer and layer."""
    num_layers = len(next(iter(summary.values()))["matrix"]["mean"]) - 1
    exits, layers = np.nonzero(after_exit(num_layers))
    table = pd.DataFrame({"exit_layer": exits, "layer": layers})
    for name, parts in summary.items():
        table[name] = np.array(parts["matrix"]["mean"])[exits, layers]
        for limit in ("mean", "low", "high"):
            table[f"{name}_difference_{limit}"] = np.array(parts["difference"][limit])[exits, layers]
    return table
