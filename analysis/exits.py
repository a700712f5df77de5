"""Visual-token exit at every layer, from one pass: `python -m analysis.exits`.

For every exit layer k: accuracy, agreement with the full model, KL divergence, remaining FLOPs and text self-attention
entropy; K* of the KL criterion; exit depths; and which of the paper's findings hold (`docs/exits.md`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from matplotlib import pyplot as plt
from omegaconf import DictConfig
from torch import Tensor

from analysis import exit_statistics, plots_paper
from analysis.exit_statistics import Finding
from analysis.statistics import (
    Array,
    Band,
    cluster_bootstrap,
    cluster_mean,
    count_images,
    mean_band,
    percentile_band,
)
from dyvte import distributed, runner, store
from dyvte.config import command, load_model
from dyvte.criteria import exit_depth, kl_to_full, lucky_exit_depth, paper_labels
from dyvte.data import Dataset, Sample, build_dataset
from dyvte.data.metrics import exact_match
from dyvte.data.shapes import ShapesDataset
from dyvte.errors import ConfigError, ModelError
from dyvte.flops import FlopCount, exit_flops
from dyvte.instrument.sweep import ENTROPIES, ExitSweep, exit_sweep, greedy_answer_ids
from dyvte.mllm import IGNORE_INDEX, MLLM, Batch
from dyvte.policies.base import Policy, Prefill, check_model

LEVEL = 0.95
QUESTIONS, CAPTIONS, TEXT_ONLY = "questions", "captions", "text_only"
"""Parts of the data: findings are about questions on images; captions and questions without image are kept apart."""
CURVES = {"accuracy": "correct", "agreement": "agree", "kl": "kl", "kl_reverse": "kl_reverse", "nll": "nll"}
"""What is reported for every exit and group of questions, with its column in the table `exits`."""

FLOPS = ("flops_total", "flops_decoder")


# ------------------------------------------------------------------------ data


class WithCaptions(Dataset):
    """The questions of the built-in task, followed by captions of its first images."""

    def __init__(self, questions: ShapesDataset, captions: ShapesDataset) -> None:
        self.parts = (questions, captions)

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __getitem__(self, index: int) -> Sample:
        questions, captions = self.parts
        if index < len(questions):
            return questions[index]
        sample = captions[index - len(questions)]
        return replace(sample, id=f"{sample.id}-caption", metadata={**sample.metadata, "part": CAPTIONS})

    @property
    def fingerprint(self) -> str:
        """Of both parts."""
        return "+".join(part.fingerprint for part in self.parts)


def questions_and_captions(cfg: DictConfig) -> Dataset:
    """The data of the run."""
    dataset = build_dataset(cfg.data)
    if cfg.captions < 0:
        raise ConfigError(f"captions is {cfg.captions}; give a number of images, or 0 for none")
    if not isinstance(dataset, ShapesDataset) or not cfg.captions:
        return dataset
    captions = ShapesDataset(cfg.data.split, cfg.captions, cfg.data.seed, kinds=["caption"])
    return WithCaptions(dataset, captions)


class OtherImages:
    """Another scene's image for every sample: does the answer need this image, or would any do?"""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self._pool: list[Sample] | None = None

    def of(self, samples: Sequence[Sample]) -> list[Any]:
        """For each sample the image of the next one in the batch that shows another scene; None where there is none."""
        others = []
        for index, sample in enumerate(samples):
            in_order = [*samples[index + 1 :], *samples[:index]]
            found = self._first(in_order, sample) or self._first(self._two_scenes(), sample)
            others.append(None if found is None or sample.image is None else found.image)
        return others

    @staticmethod
    def _first(candidates: Sequence[Sample], sample: Sample) -> Sample | None:
        fitting = (each for each in candidates if each.image is not None and each.image_id != sample.image_id)
        return next(fitting, None)

    def _two_scenes(self) -> list[Sample]:
        """The first two scenes of the data, for batches that show one scene only."""
        if self._pool is None:
            self._pool = []
            for sample in self.dataset.readable():
                if sample.image is not None and all(sample.image_id != each.image_id for each in self._pool):
                    self._pool.append(sample)
                if len(self._pool) == 2:
                    break
        return self._pool


def part_of(sample: Sample) -> str:
    """Which part of the data a sample belongs to."""
    return TEXT_ONLY if sample.image is None else str(sample.metadata.get("part", QUESTIONS))


# ------------------------------------------------------------------------ measuring


@dataclass
class RowExit(Policy):
    """`FixedExit` with an exit layer for every row of the batch.

    Attributes:
        layers: [B] exit layer of each row.
    """

    layers: Tensor

    def before_layer(self, layer: int, prefill: Prefill) -> None:
        """Drop the visual positions of the rows whose exit this is."""
        prefill.drop(prefill.layout.visual & (self.layers == layer)[:, None])


@dataclass
class Measurement:
    """Turns the samples of a batch into the tables of the run."""

    mllm: MLLM
    dataset: Dataset
    max_new_tokens: int
    accuracy: bool
    batch_size: int
    branch_tokens: int | None
    _flops: dict[tuple[int, int], list[FlopCount]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.other_images = OtherImages(self.dataset)

    @torch.no_grad()
    def __call__(self, samples: list[Sample]) -> dict[str, pd.DataFrame]:
        """The tables `samples`, `exits`, `tokens` and `entropy` of one batch."""
        images, questions = [sample.image for sample in samples], [sample.question for sample in samples]
        batch = self.mllm.encode(images, questions)
        answer_ids = greedy_answer_ids(self.mllm, batch, self.max_new_tokens)
        try:
            sweep = exit_sweep(
                self.mllm,
                batch,
                answer_ids,
                shared_image=self._shared_images(samples),
                branch_tokens=self.branch_tokens,
            ).to("cpu")
        except ModelError as error:
            raise ModelError(
                f"{error} (questions {samples[0].id} to {samples[-1].id}, in this order; half precision may overflow: "
                "try model.dtype=float32 or bfloat16)"
            ) from error
        sweep = sweep.up_to_ties()
        answers = unpadded(answer_ids)
        text = self.mllm.decode(answers)
        exits = self._exits(samples, batch, sweep, text)
        return {
            "samples": self._samples(samples, batch, sweep, answers, text),
            "exits": exits,
            "tokens": token_table(samples, sweep),
            "entropy": entropy_table(samples, sweep),
        }

    @staticmethod
    def _shared_images(samples: Sequence[Sample]) -> list[int] | None:
        """Numbers of the images; None where no two questions share one."""
        number = {image_id: index for index, image_id in enumerate(sample.image_id for sample in samples)}
        return [number[sample.image_id] for sample in samples] if len(number) < len(samples) else None

    def _samples(
        self, samples: list[Sample], batch: Batch, sweep: ExitSweep, answers: list[list[int]], text: list[str]
    ) -> pd.DataFrame:
        labels = paper_labels(sweep.agree, sweep.nll)
        elsewhere = self._answers_with_another_image(samples)
        layout = batch.layout
        return pd.DataFrame(
            {
                "id": [sample.id for sample in samples],
                "part": [part_of(sample) for sample in samples],
                "image_id": [sample.image_id for sample in samples],
                "kind": [sample.kind for sample in samples],
                "question": [sample.question for sample in samples],
                "reference": [sample.answer for sample in samples],
                "answer": text,
                "answer_tokens": [len(ids) for ids in answers],
                "visual_tokens": layout.visual.sum(1).tolist(),
                "text_tokens": layout.text.sum(1).tolist(),
                # another scene's image changes the answer; null where there is no image, or no other
                "needs_image": pd.array(
                    [None if other is None else other != ids for other, ids in zip(elsewhere, answers, strict=True)],
                    dtype="boolean",
                ),
                "exit_depth": exit_depth(labels).tolist(),
                "lucky_exit_depth": lucky_exit_depth(labels).tolist(),
            }
        )

    def _answers_with_another_image(self, samples: list[Sample]) -> list[list[int] | None]:
        """Answer ids for each sample with another scene's image in place of its own."""
        images = self.other_images.of(samples)
        asked = [row for row, image in enumerate(images) if image is not None and part_of(samples[row]) == QUESTIONS]
        answers: list[list[int] | None] = [None] * len(samples)
        if asked:
            batch = self.mllm.encode([images[row] for row in asked], [samples[row].question for row in asked])
            for row, ids in zip(asked, unpadded(greedy_answer_ids(self.mllm, batch, self.max_new_tokens)), strict=True):
                answers[row] = ids
        return answers

    def _exits(self, samples: list[Sample], batch: Batch, sweep: ExitSweep, text: list[str]) -> pd.DataFrame:
        """One row per sample and exit layer, exit layers ascending."""
        answers = self._exit_answers(samples, sweep, text)
        correct: list[bool | None] = []
        for sample, of_sample in zip(samples, answers, strict=True):
            known = [answer for answer in of_sample if answer is not None]
            if not self.accuracy or sample.answer is None or len(known) < len(of_sample):
                # Those that agree with the full model would alone flatter the early exits.
                correct += [None] * len(of_sample)
            else:
                correct += [exact_match(answer, sample.answer) for answer in known]
        flops = [count for row in range(len(samples)) for count in self._exit_flops(samples[row], batch, row)]
        return pd.DataFrame(
            {
                "id": np.repeat([sample.id for sample in samples], self.mllm.num_layers + 1),
                "exit_layer": np.tile(np.arange(self.mllm.num_layers + 1), len(samples)),
                "answer": [answer for of_sample in answers for answer in of_sample],
                "correct": pd.array(correct, dtype="boolean"),
                "agree": sweep.agree.flatten().numpy(),
                "label": paper_labels(sweep.agree, sweep.nll).flatten().numpy(),
                "nll": sweep.nll.flatten().numpy(),
                "kl": kl_to_full(sweep.logits, "exit_to_full").flatten().numpy(),
                "kl_reverse": kl_to_full(sweep.logits, "full_to_exit").flatten().numpy(),
                "logit_change": logit_change(sweep.logits).flatten().numpy(),
                "flops_total": [count.total for count in flops],
                "flops_decoder": [count.decoder for count in flops],
            }
        )

    def _exit_answers(self, samples: list[Sample], sweep: ExitSweep, text: list[str]) -> list[list[str | None]]:
        """Answer of every sample under every exit. Only those that differ from the full model's are decoded."""
        answers: list[list[str | None]] = [
            [text[row] if agrees else None for agrees in sweep.agree[row].tolist()] for row in range(len(samples))
        ]
        if not self.accuracy:
            return answers
        missing = [
            (exit_layer, row)
            for row, sample in enumerate(samples)
            if sample.answer is not None and part_of(sample) != CAPTIONS
            for exit_layer, answer in enumerate(answers[row])
            if answer is None
        ]
        missing.sort()  # neighbours leave at neighbouring layers: fewer layers run in two groups
        for start in range(0, len(missing), self.batch_size):
            pairs = missing[start : start + self.batch_size]
            asked = [samples[row] for _, row in pairs]
            batch = self.mllm.encode([sample.image for sample in asked], [sample.question for sample in asked])
            layers = torch.tensor([exit_layer for exit_layer, _ in pairs], device=batch["input_ids"].device)
            with RowExit(layers)(self.mllm):
                decoded = self.mllm.decode(unpadded(greedy_answer_ids(self.mllm, batch, self.max_new_tokens)))
            for (exit_layer, row), answer in zip(pairs, decoded, strict=True):
                answers[row][exit_layer] = answer
        return answers

    def _exit_flops(self, sample: Sample, batch: Batch, row: int) -> list[FlopCount]:
        """FLOPs of the prefill under every exit; counted once for every prompt shape."""
        shape = int(batch.layout.visual[row].sum()), int(batch.layout.text[row].sum())
        if shape not in self._flops:
            alone = self.mllm.encode([sample.image], [sample.question])
            self._flops[shape] = exit_flops(self.mllm, alone)
        return self._flops[shape]


def unpadded(answer_ids: Tensor) -> list[list[int]]:
    """Answer ids [B, A] without their padding."""
    return [[token for token in row if token != IGNORE_INDEX] for row in answer_ids.tolist()]


def logit_change(logits: Tensor) -> Tensor:
    """Root mean square change of the logits under every exit, relative to the full model's spread.

    Args:
        logits: [B, L + 1, vocab]; tokens that the model rules out (-inf) are left out.

    Returns:
        [B, L + 1]; 0 at L.
    """
    possible = torch.isfinite(logits).all(1, keepdim=True)
    logits = torch.where(possible, logits, 0.0).double()
    number = possible.sum(-1)
    full = logits[:, -1:]
    mean = full.sum(-1, keepdim=True) / number[..., None]
    spread = torch.where(possible, full - mean, 0.0).square().sum(-1).div(number).sqrt()
    change = (logits - full).square().sum(-1).div(number).sqrt()
    return (change / spread.clamp_min(torch.finfo(torch.float32).tiny)).float()


def token_table(samples: Sequence[Sample], sweep: ExitSweep) -> pd.DataFrame:
    """One row per sample, exit layer and answer token (0 is the first; the end token is the last)."""
    valid = sweep.answer_valid[:, None].expand_as(sweep.token_agree)
    row, exit_layer, token = valid.nonzero(as_tuple=True)
    return pd.DataFrame(
        {
            "id": np.array([sample.id for sample in samples])[row.numpy()],
            "exit_layer": exit_layer.numpy(),
            "token": token.numpy(),
            "agree": sweep.token_agree[valid].numpy(),
            "nll": sweep.token_nll[valid].numpy(),
        }
    )


def entropy_table(samples: Sequence[Sample], sweep: ExitSweep) -> pd.DataFrame:
    """One row per sample, exit layer k and layer l >= k (all layers for k = L, the full model)."""
    num_layers = sweep.text_entropy.shape[2]
    exits, layers = np.nonzero(after_exit(num_layers))
    return pd.DataFrame(
        {
            "id": np.repeat([sample.id for sample in samples], len(exits)),
            "exit_layer": np.tile(exits, len(samples)),
            "layer": np.tile(layers, len(samples)),
            **{name: getattr(sweep, name)[:, exits, layers].flatten().numpy() for name in ENTROPIES},
        }
    )


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


# --------------------------------------------------------------------------- command


def measurement(mllm: MLLM, dataset: Dataset, cfg: DictConfig) -> Measurement:
    """The measurement that a configuration asks for.

    Raises:
        ConfigError: a setting is out of range.
    """
    if cfg.max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens is {cfg.max_new_tokens}: answers would be empty; give a positive number")
    if not 0 <= cfg.kl_start <= mllm.num_layers:
        raise ConfigError(f"kl_start is {cfg.kl_start}; this model has exit layers 0..{mllm.num_layers}")
    if not cfg.etas or min(cfg.etas) < 0:
        raise ConfigError(f"etas is {cfg.etas}; give one or more thresholds in nats, for instance etas=[0.003]")
    check_model(mllm)
    return Measurement(mllm, dataset, cfg.max_new_tokens, cfg.accuracy, cfg.batch_size, cfg.branch_tokens)


@command("exits")
def main(cfg: DictConfig) -> None:
    """Measure, summarise and draw; continues where an earlier run of the same command was stopped."""
    dataset = questions_and_captions(cfg)
    mllm = load_model(cfg)
    run(cfg, mllm, dataset)


def run(cfg: DictConfig, mllm: MLLM, dataset: Dataset) -> dict[str, Any] | None:
    """The command with a model and data that are loaded already.

    Returns:
        The summary; None in processes other than the main one.
    """
    measure = measurement(mllm, dataset, cfg)
    fingerprint = store.fingerprint(mllm, dataset, cfg, max_new_tokens=cfg.max_new_tokens, accuracy=cfg.accuracy)
    folder = store.RunFolder.open(cfg.output_dir, fingerprint, cfg, overwrite=cfg.overwrite)
    batches = runner.consecutive_batches(len(dataset), cfg.batch_size)
    runner.run(folder, dataset, batches, measure, f"{cfg.model.name} on {cfg.data.name}")
    if not distributed.is_main():
        return None
    summary = report(cfg, folder, mllm)
    print(outline(summary))
    failed = f", {summary['num_failed']} left out (failures.jsonl)" if summary["num_failed"] else ""
    print(f"{summary['num_samples']} samples{failed}; results in {folder.path}")
    return summary


def outline(summary: Mapping[str, Any]) -> str:
    """The findings and the main table, for the terminal."""
    lines = ["exit layer  accuracy  agreement        KL  decoder FLOPs"]
    full = summary["flops_decoder"][-1]
    for k, agreement in enumerate(summary["agreement"]):
        accuracy = "       -" if summary["accuracy"][k] is None else f"{summary['accuracy'][k]:8.3f}"
        share = summary["flops_decoder"][k] / full
        lines.append(f"{k:10d}  {accuracy}  {agreement:9.3f}  {summary['kl'][k]:8.2g}  {share:13.0%}")
    k_star = ", ".join(f"{eta}: {layer}" for eta, layer in summary["k_star"].items())
    lines.append(f"K* (first exit with KL at most eta): {k_star}")
    for finding in summary["findings"].values():
        lines.append(f"{finding['verdict'].replace('_', ' ')}: {finding['statement']}")
        lines += [f"  {reason}" for reason in finding["reasons"]]
    return "\n".join(lines)


def report(cfg: DictConfig, folder: store.RunFolder, mllm: MLLM) -> dict[str, Any]:
    """Everything that follows from the tables: curves, K*, findings, figures, summary."""
    everything = Results.read(folder)
    asks = (everything.samples["part"] == QUESTIONS).to_numpy() & (everything.samples["visual_tokens"] > 0).to_numpy()
    if not asks.any():
        raise ConfigError(
            f"no question of data={cfg.data.name} has an image: there are no visual tokens that could exit"
        )
    results = everything.where(asks)
    overall = Group.of(results, cfg)
    layer = overall.stops.exit_layer
    kinds = {
        str(kind): results.where((results.samples["kind"] == kind).to_numpy())
        for kind in results.samples["kind"].unique()
    }
    # Many kinds are many chances of a false finding: Bonferroni.
    level = 1 - (1 - LEVEL) / len(kinds)
    by_kind = {kind: Group.of(of_kind, cfg, level) for kind, of_kind in sorted(kinds.items())}
    subsets = {"all": overall}
    needs_image = results.samples["needs_image"].fillna(False).to_numpy(bool)
    if needs_image.any():
        subsets["needs_image"] = Group.of(results.where(needs_image), cfg)

    findings = {
        "contribution_stops": overall.stops,
        "early_exit_disturbs_text_entropy": exit_statistics.early_exit_disturbs(
            results.entropies["text_entropy"],
            layer,
            results.images,
            max_change=cfg.findings.max_entropy_change,
            level=LEVEL,
            n_boot=cfg.bootstrap,
            seed=cfg.seed,
        ),
        "exit_depth_depends_on_kind": exit_statistics.depth_depends_on_kind(
            results.samples["exit_depth"],
            results.samples["kind"].to_numpy(),
            results.images,
            overall.stops.details.get("contributes", False),
            level=LEVEL,
            n_perm=cfg.permutations,
            seed=cfg.seed,
        ),
    }
    kl_exits = exit_statistics.kl_exits(
        results.exits["kl"], results.images, list(cfg.etas), cfg.kl_start, LEVEL, cfg.bootstrap, cfg.seed
    )
    entropy = entropy_summary(results, cfg)
    of_tokens = folder.read_table("tokens").merge(
        everything.samples[["id", "part", "image_id"]], on="id", how="left", validate="many_to_one"
    )
    tokens = token_summary(token_depths(of_tokens), cfg)
    flops = {name: cluster_mean(results.exits[name]) for name in FLOPS}

    named = {**subsets, **{f"kind={kind}": group for kind, group in by_kind.items()}}
    folder.write_table("curves", long_table(named))
    folder.write_table("entropy_mean", entropy_long_table(entropy))
    folder.write_table("token_curves", token_curves(of_tokens))
    summary_groups = {name: group.summary() for name, group in named.items()}
    content = store.plain(
        {
            "model": cfg.model.name,
            "data": cfg.data.name,
            "num_layers": mllm.num_layers,
            "num_questions": len(results.samples),
            "num_images": count_images(results.images),
            "num_captions": int((everything.samples["part"] == CAPTIONS).sum()),
            "num_without_image": int((everything.samples["visual_tokens"] == 0).sum()),
            **{name: overall.curves[name].mean for name in CURVES},
            **flops,
            "k_star": {f"{each.eta:g}": each.layer for each in kl_exits},
            "k_star_details": [asdict(each) for each in kl_exits],
            "kl_start": cfg.kl_start,
            "findings": {name: finding.to_dict() for name, finding in findings.items()},
            "overall": summary_groups.pop("all"),
            "needs_image": summary_groups.pop("needs_image", None),
            "kinds": {name.removeprefix("kind="): group for name, group in summary_groups.items()},
            "entropy": entropy,
            "tokens": tokens,
            "settings": {"level": LEVEL, "bootstrap": cfg.bootstrap, "permutations": cfg.permutations, **cfg.findings},
        }
    )
    figures = draw(content)
    for name, figure in figures.items():
        folder.save_figure(name, figure)
    return folder.write_summary(**content, figures=sorted(figures))


def draw(summary: Mapping[str, Any]) -> dict[str, plt.Figure]:
    """All figures, by file name, from what `summary.json` will say."""
    figures = {
        "exits": plots_paper.manual_exit(summary),
        "kl": plots_paper.kl_criterion(summary),
        "entropy": plots_paper.text_entropy(summary),
        "exit_depth": plots_paper.exit_depths(summary),
    }
    if len(summary["kinds"]) > 1:
        figures["kinds"] = plots_paper.manual_exit_by_kind(summary)
    if {QUESTIONS, CAPTIONS} <= summary["tokens"].keys():
        figures["tokens"] = plots_paper.answer_tokens(summary)
    return figures


if __name__ == "__main__":
    main()
