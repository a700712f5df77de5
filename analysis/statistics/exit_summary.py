"""The tables of an exits run, summarised by group of samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from omegaconf import DictConfig

from dyvte.instrument.sweep import ENTROPIES
from dyvte.runs import store

from .bands import (
    LEVEL,
    Array,
    Band,
    ImageBootstrap,
    bands_table,
    bands_to_dict,
    cluster_mean,
    keyed_array,
    mean_band,
    percentile_band,
    rate_band,
)
from .exits import ExitFinding, contribution_stops, settled_layer

QUESTIONS, CAPTIONS, TEXT_ONLY = "questions", "captions", "text_only"
"""Parts of the data: findings are about questions on images; captions and questions without image are kept apart."""
LEAST_ANSWERS = 10
EXIT_MEASURES = {"accuracy": "correct", "agreement": "agree", "kl": "kl", "kl_reverse": "kl_reverse", "nll": "nll"}
"""What is reported for every exit and group of questions, with its column in the table `exits`."""
RATES = ("accuracy", "agreement")
FLOPS = ("flops_total", "flops_decoder")


def after_exit(num_layers: int) -> npt.NDArray[np.bool_]:
    """[L + 1, L] where E[k, l] is defined: l >= k, and every layer of the full model (k = L)."""
    exits, layers = np.arange(num_layers + 1)[:, None], np.arange(num_layers)
    return (layers >= exits) | (exits == num_layers)


@dataclass(frozen=True)
class ExitResults:
    """The tables of a run as arrays. n samples, L layers.

    Attributes:
        samples: n rows.
        exits: column -> `[n, L + 1]`.
        entropies: name -> E[k, l] of each sample, `[n, L + 1, L]`; NaN where exit k is still to come.
        swapped_entropy: the full model's text entropy with another scene's image, `[n, L]`; NaN where there is none.
        bootstrap: over the images of the samples.
    """

    samples: pd.DataFrame
    exits: dict[str, Array]
    entropies: dict[str, Array]
    swapped_entropy: Array
    bootstrap: ImageBootstrap

    @classmethod
    def read(cls, folder: store.RunFolder, draws: int, seed: int) -> ExitResults:
        """From the run folder."""
        samples, exits, entropy, swapped = (
            folder.read_table(name) for name in ("samples", "exits", "entropy", "entropy_swapped")
        )
        ids = samples["id"]
        columns = [name for name in exits.columns if name not in ("id", "exit_layer", "answer")]
        return cls(
            samples,
            {name: keyed_array(exits, name, ids, "exit_layer") for name in columns},
            {name: keyed_array(entropy, name, ids, "exit_layer", "layer") for name in ENTROPIES},
            keyed_array(swapped, "text_entropy", ids, "layer"),
            ImageBootstrap(samples["image_id"].to_numpy(), draws, seed),
        )

    def where(self, mask: npt.NDArray[np.bool_]) -> ExitResults:
        """Some of the samples."""
        return ExitResults(
            self.samples[mask],
            {name: values[mask] for name, values in self.exits.items()},
            {name: values[mask] for name, values in self.entropies.items()},
            self.swapped_entropy[mask],
            self.bootstrap[mask],
        )


@dataclass(frozen=True)
class QuestionGroup:
    """A group of questions: all, one kind, or those that need the image."""

    results: ExitResults
    curves: dict[str, Band]
    depth: Band
    stops: ExitFinding

    @classmethod
    def of(cls, results: ExitResults, cfg: DictConfig, level: float = LEVEL) -> QuestionGroup:
        """Curves, exit depth and finding 1 of these samples; `level` is the finding's.

        Accuracy is NaN without reference answers.
        """
        bootstrap = results.bootstrap
        curves = {
            name: rate_band(results.exits[column], bootstrap.images)
            if name in RATES
            else mean_band(results.exits[column], bootstrap)
            for name, column in EXIT_MEASURES.items()
        }
        depth = mean_band(results.samples["exit_depth"], bootstrap)
        right, agree, change = (results.exits[name] for name in ("correct", "agree", "logit_change"))
        stops = contribution_stops(right, agree, change, bootstrap, **cfg.findings, level=level)
        return cls(results, curves, depth, stops)

    def summary(self) -> dict[str, Any]:
        """What `summary.json` says about it."""
        results, depths = self.results, self.results.samples["exit_depth"]
        entropy = results.entropies["text_entropy"]
        return {
            **results.bootstrap.counts(),
            **{name: self.curves[name].mean for name in ("accuracy", "agreement", "kl")},
            **{name: cluster_mean(results.exits[name]) for name in FLOPS},
            "bands": bands_to_dict(self.curves),
            "exit_depth": {
                **self.depth.to_dict(),
                "counts": np.bincount(depths, minlength=entropy.shape[1]),
                "lucky_mean": results.samples["lucky_exit_depth"].mean(),
            },
            "text_entropy": cluster_mean(entropy),
            "text_entropy_difference": cluster_mean(entropy - entropy[:, -1:]),
            "stops": asdict(self.stops),
        }


def entropy_summary(results: ExitResults) -> dict[str, Any]:
    """E[k, l] and E[k, l] - E[L, l], means over samples, each with a band."""
    return {
        name: {
            "matrix": mean_band(entropy, results.bootstrap).to_dict(),
            "difference": mean_band(entropy - entropy[:, -1:], results.bootstrap).to_dict(),
        }
        for name, entropy in results.entropies.items()
    }


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
    first = tokens[tokens["exit_layer"] == 0].sort_values(["id", "token"], kind="stable")
    wrong = 1 - keyed_array(tokens, "agree", first["id"].unique(), "token", "exit_layer")
    wrong[..., -1] = 0.0  # the full model agrees with itself, up to ties
    depth = settled_layer(wrong, 0.5)[pd.factorize(first["id"])[0], first["token"]]
    return first[["id", "part", "image_id", "token"]].assign(depth=depth).reset_index(drop=True)


def token_summary(depths: pd.DataFrame, cfg: DictConfig) -> dict[str, Any]:
    """Mean depth by index of the answer token for questions and captions, and how far their whole answers differ.

    Indices that fewer than `LEAST_ANSWERS` reach are left out, and captions if there are fewer.
    """
    summary: dict[str, Any] = {}
    first_tokens = depths.loc[depths["token"] == 0, "part"].value_counts()
    parts = [part for part in (QUESTIONS, CAPTIONS) if first_tokens.get(part, 0) >= LEAST_ANSWERS]
    for part in parts:
        of_part = depths[depths["part"] == part]
        of_index = {index: rows for index, rows in of_part.groupby("token") if len(rows) >= LEAST_ANSWERS}
        bands = [
            mean_band(rows["depth"], ImageBootstrap(rows["image_id"].to_numpy(), cfg.bootstrap, cfg.seed))
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
        means, replicates = ImageBootstrap(whole["image_id"].to_numpy(), cfg.bootstrap, cfg.seed).mean(values)
        for index, part in enumerate((CAPTIONS, QUESTIONS)):
            summary[part]["whole_answer"] = percentile_band(means[index], replicates[:, index]).to_dict()
        summary["captions_minus_questions"] = percentile_band(means @ [1, -1], replicates @ [1, -1]).to_dict()
    return summary


def exit_curves_table(groups: Mapping[str, QuestionGroup]) -> pd.DataFrame:
    """Every curve of every group of questions, one row per exit layer."""
    curves = (
        ({"group": name, "num_samples": len(group.results.samples), "measure": measure}, band)
        for name, group in groups.items()
        for measure, band in group.curves.items()
    )
    return bands_table(curves, "exit_layer")


def entropy_mean_table(summary: Mapping[str, Any]) -> pd.DataFrame:
    """E[k, l] and its difference from the full model, one row per exit layer and layer."""
    num_layers = len(next(iter(summary.values()))["matrix"]["mean"]) - 1
    exits, layers = np.nonzero(after_exit(num_layers))
    table = pd.DataFrame({"exit_layer": exits, "layer": layers})
    for name, parts in summary.items():
        table[name] = np.array(parts["matrix"]["mean"])[exits, layers]
        for limit in ("mean", "low", "high"):
            table[f"{name}_difference_{limit}"] = np.array(parts["difference"][limit])[exits, layers]
    return table
