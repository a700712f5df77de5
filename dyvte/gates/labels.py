"""The label set: what every question's answer becomes under every exit layer, and the token status after every layer.

One pass over a data set: the model answers greedily, one sweep scores that answer under all exits (`dyvte.exit_sweep`)
and gives the status after every layer. It lies in a run folder, a shard a batch, so a killed pass goes on where it was
and a folder never mixes models, data or settings. Label rules, ratios and status ablations are views of one set.

    samples      id image_id kind metadata reference answer correct answer_tokens text_tokens visual_tokens
    exits        id exit_layer agree nll flops_total flops_decoder,
                 with `ground_truth` truth_agree truth_nll, with `answers` answer correct
    status       (tensors) one [b, L - 1, d] a part, after every layer but the last; [b, 1, d] for the part `question`,
                 [b, L - 1, 3] for `lens`
    counterfactual  (tensors, half precision) text status and lens of runs that saw less of the image, or another one:
                 [b, E, L - 1, 2d] and [b, E, L - 1, 3] of the E exit layers `exits`, [b, 1, L - 1, ...] of `swapped`
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from dyvte.batch import Batch
from dyvte.data.base import Dataset, Sample, image_numbers, sample_columns
from dyvte.data.metrics import correctness
from dyvte.errors import ConfigError, DataError
from dyvte.gates.every_exit import PromptCosts, answers_by_exit, sweep_answers
from dyvte.gates.features import LENS, QUESTION, assemble, bases_of
from dyvte.gates.lens import lens_features
from dyvte.instrument.hooks import layer_states
from dyvte.instrument.states import STATUS_PARTS, TEXT_STATUS, status_weights, token_status
from dyvte.instrument.sweep import ExitSweep, exit_sweep
from dyvte.instrument.sweep.criteria import paper_labels, release_labels, token_agreement
from dyvte.mllm import MLLM
from dyvte.runs.runner import consecutive_batches, run
from dyvte.runs.store import RunFolder, fingerprint

LABEL_RULES = ("stable", "agree", "paper", "release")
"""stable: the answer is the full model's under this exit and every later one. agree: under this exit. paper and
release: `dyvte.instrument.sweep.criteria.paper_labels` and `release_labels`."""


@dataclass(frozen=True)
class LabelSettings:
    """What a label set holds; `labels` in `conf/train.yaml` says what each setting does.

    The status `question` is what a model has at its end when it never saw the image, for the control that may look at
    the question only. With `answers`, what every exit that disagrees answers is kept too, for the accuracy of every
    exit.
    """

    max_new_tokens: int = 64
    status: tuple[str, ...] = (*STATUS_PARTS, QUESTION)
    exits: tuple[int, ...] = ()
    swapped: bool = False
    ground_truth: bool = False
    answers: bool = False

    def __post_init__(self) -> None:
        known = (*STATUS_PARTS, LENS, QUESTION)
        unknown = [part for part in self.status if part not in known]
        if unknown:
            raise ConfigError(f"unknown status part {unknown[0]!r}; choose from {', '.join(known)}")


def label_fingerprint(mllm: MLLM, dataset: Dataset, cfg: DictConfig, settings: LabelSettings) -> dict[str, Any]:
    """What a label set depends on, see `dyvte.runs.store.fingerprint`."""
    own: Any = OmegaConf.merge(cfg, {"command": "labels"})
    kept = {**asdict(settings), "status": list(settings.status), "exits": list(settings.exits)}
    added = ("exits", "swapped")  # sets made before these could be kept stay what they are
    return fingerprint(mllm, dataset, own, **{key: each for key, each in kept.items() if each or key not in added})


def collect_labels(
    mllm: MLLM,
    dataset: Dataset,
    cfg: DictConfig,
    path: str | Path,
    settings: LabelSettings,
    description: str = "labels",
) -> LabelSet:
    """Make the label set of a data set in the folder `path`, or finish the one that is there.

    Questions without an image have nothing to exit and are left out of training later.
    """
    # labels are dear: no overwrite=true of what is made from them deletes them in passing
    remedy = f"name another folder for the labels (labels.dir=FOLDER), or delete {path}"
    folder = RunFolder.open(path, label_fingerprint(mllm, dataset, cfg, settings), cfg, remedy=remedy)
    batches = consecutive_batches(len(dataset), cfg.batch_size)
    costs = PromptCosts(mllm)
    run(folder, dataset, batches, functools.partial(label_batch, mllm, settings=settings, costs=costs), description)
    return LabelSet(folder)


@torch.no_grad()
def label_batch(
    mllm: MLLM, samples: Sequence[Sample], settings: LabelSettings, costs: PromptCosts
) -> dict[str, pd.DataFrame | dict[str, Tensor]]:
    """Tables and tensors of one batch, as listed at the top of this file."""
    parts = [part for part in settings.status if part in STATUS_PARTS]
    blind = [0] if QUESTION in settings.status and 0 not in settings.exits else []
    swept = sweep_answers(
        mllm,
        samples,
        settings.max_new_tokens,
        status_parts=parts or TEXT_STATUS,
        status_of_exits=[*settings.exits, *blind],
        entropy=False,
    )
    batch, answers, sweep = swept.batch, swept.answers, swept.sweep
    flops = [count for row, sample in enumerate(samples) for count in costs.of(batch, row, sample)]
    num_exits = mllm.num_layers + 1
    exits = {
        "id": np.repeat([sample.id for sample in samples], num_exits),
        "exit_layer": np.tile(np.arange(num_exits), len(samples)),
        "agree": _flat(sweep.agree),
        "nll": _flat(sweep.nll),
        "flops_total": [count.total for count in flops],
        "flops_decoder": [count.decoder for count in flops],
    }
    if settings.ground_truth:
        exits.update(_truth_columns(mllm, batch, samples))
    correct = [correctness(answer, sample.answer) for answer, sample in zip(answers, samples, strict=True)]
    if settings.answers:
        by_exit = answers_by_exit(mllm, swept, settings.max_new_tokens)
        exits["answer"] = np.array([answer for row in by_exit for answer in row], dtype=object)
        pairs = ((each or "", sample.answer) for row, sample in zip(by_exit, samples, strict=True) for each in row)
        exits["correct"] = np.array([correctness(*pair) for pair in pairs])
    table = {
        **sample_columns(samples),
        "answer": answers,
        "correct": correct,
        "answer_tokens": _flat(sweep.answer_valid.sum(1)),
        "text_tokens": _flat(batch.layout.text.sum(1)),
        "visual_tokens": _flat(batch.layout.visual.sum(1)),
    }
    # [b, L, P * d] -> one [b, L - 1, d] a part, in the model's own precision
    pieces = sweep.text_status[:, :-1].to("cpu", mllm.dtype).chunk(len(parts), dim=-1) if parts else ()
    status = {part: piece.contiguous() for part, piece in zip(parts, pieces, strict=True)}
    if QUESTION in settings.status:
        last = sweep.exit_status[:, [*settings.exits, *blind].index(0), -1, mllm.hidden_size :]
        status[QUESTION] = last[:, None].to("cpu", mllm.dtype).contiguous()
    made: dict[str, pd.DataFrame | dict[str, Tensor]] = {
        "samples": pd.DataFrame(table),
        "exits": pd.DataFrame(exits),
        "status": status,
    }
    if LENS in settings.status:
        status[LENS] = lens_features(mllm, sweep.text_status[:, :-1, _last(parts, mllm.hidden_size)]).cpu().contiguous()
    if settings.exits or settings.swapped:
        made["counterfactual"] = _counterfactual(mllm, samples, sweep, settings)
    return made


def _last(parts: Sequence[str], size: int) -> slice:
    """Where the prompt's last state lies in a status; the lens reads it."""
    if "text_last" not in parts:
        raise ConfigError("the status part 'lens' is read from the part 'text_last': keep both (labels.status)")
    place = list(parts).index("text_last")
    return slice(place * size, (place + 1) * size)


def _counterfactual(
    mllm: MLLM, samples: Sequence[Sample], sweep: ExitSweep, settings: LabelSettings
) -> dict[str, Tensor]:
    """Text statuses of runs that saw less of the image, or another one, as listed at the top of this file."""
    found = {"exits": sweep.exit_status[:, : len(settings.exits), :-1]}
    if settings.swapped:
        others = mllm.encode(other_images(samples), [sample.question for sample in samples])
        found["swapped"] = plain_status(mllm, others)[:, None, :-1]
    if LENS in settings.status:
        found |= {f"{name}_lens": lens_features(mllm, each[..., mllm.hidden_size :]) for name, each in found.items()}
    return {name: each.to("cpu", torch.float16).contiguous() for name, each in found.items()}


def _flat(tensor: Tensor) -> np.ndarray[Any, Any]:
    return tensor.cpu().flatten().numpy()


def _truth_columns(mllm: MLLM, batch: Batch, samples: Sequence[Sample]) -> dict[str, np.ndarray[Any, Any]]:
    """Share of tokens that stay the full model's, and cross-entropy, teacher-forced on the reference answers."""
    references = [sample.answer for sample in samples]
    missing = [sample.id for sample in samples if sample.answer is None]
    if missing:
        raise DataError(f"sample {missing[0]!r} has no reference answer, which the label rule 'release' needs")
    truth_ids = mllm.answer_ids([sample.question for sample in samples], [str(each) for each in references])
    sweep = exit_sweep(mllm, batch, truth_ids, shared_image=image_numbers(samples), entropy=False)
    share = token_agreement(sweep.token_argmax, sweep.answer_valid)
    return {"truth_agree": _flat(share), "truth_nll": _flat(sweep.nll)}


def other_images(samples: Sequence[Sample]) -> list[Any]:
    """For each sample the image of the next one in the batch about another image; its own where all share one."""
    others = []
    for row, sample in enumerate(samples):
        behind = [*samples[row + 1 :], *samples[:row]]
        fits = (each.image for each in behind if each.image is not None and each.image_id != sample.image_id)
        others.append(None if sample.image is None else next(fits, sample.image))
    return others


def plain_status(mllm: MLLM, batch: Batch) -> Tensor:
    """[b, L, 2d] text status after every layer of the unchanged model."""
    weights, found = status_weights(batch.layout), list[Tensor]()

    def note(module: nn.Module, args: Any, output: Any) -> None:
        found.append(token_status(layer_states(mllm, output)[..., : mllm.hidden_size], weights))

    with ExitStack() as stack:
        for layer in mllm.layers:
            stack.enter_context(layer.register_forward_hook(note))
        mllm.model(**batch, use_cache=False)
    return torch.stack(found, dim=1)


class LabelSet:
    """A finished label set: n samples, exit layers 0..L.

    Attributes:
        samples: one row a sample.
        agree: [n, L + 1] whether exit k generates the full model's answer.
        nll: [n, L + 1] cross-entropy of that answer, in nats.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.samples = folder.read_table("samples")
        self._exits = folder.read_table("exits")
        self.agree = torch.from_numpy(self._by_exit("agree").astype(bool))
        self.nll = torch.from_numpy(self._by_exit("nll"))

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def num_layers(self) -> int:
        """L."""
        return self.agree.shape[1] - 1

    @property
    def has_image(self) -> Tensor:
        """[n] whether the sample shows an image."""
        return torch.from_numpy(self.samples["visual_tokens"].to_numpy(copy=True) > 0)

    @property
    def flops(self) -> Tensor:
        """[n, L + 1] operations that the decoder takes for the prefill under every exit."""
        return torch.from_numpy(self._by_exit("flops_decoder"))

    @property
    def cost(self) -> Tensor:
        """[n, L + 1] the same in full prefills of the mean question."""
        return self.flops.double() / self.flops[:, -1].double().mean()

    @property
    def correct(self) -> Tensor:
        """[n, L + 1] accuracy of every exit; NaN where there is no reference answer."""
        return torch.from_numpy(self._by_exit("correct"))

    def _by_exit(self, column: str) -> np.ndarray[Any, Any]:
        if column not in self._exits:
            raise ConfigError(f"the labels in {self.folder.path} hold no {column!r}: collect them anew with it")
        return self._exits[column].to_numpy(copy=True).reshape(len(self.samples), -1)

    def labels(self, rule: str, ratio: float = 1.03, eps: float = 1e-3) -> Tensor:
        """[n, L + 1] whether exit k is right, after one of `LABEL_RULES`.

        `ratio` is the largest factor on the full model's cross-entropy, for `paper` and `release`; `eps` the largest
        difference in nats that `paper` forgives.
        """
        if rule == "agree":
            return self.agree
        if rule == "stable":
            return self.agree.flip(1).cumprod(1).flip(1).bool()
        if rule == "paper":
            return paper_labels(self.agree, self.nll, ratio, eps)
        if rule == "release":
            agreement, nll = (torch.from_numpy(self._by_exit(each)) for each in ("truth_agree", "truth_nll"))
            return release_labels(agreement, nll, ratio)
        raise ConfigError(f"unknown label rule {rule!r}; choose from {', '.join(LABEL_RULES)}")

    def status(self, parts: Sequence[str]) -> Tensor:
        """[n, L - 1, inputs] what gates look at after every layer but the last, see `dyvte.gates.features`."""
        gates = self.num_layers - 1
        stored = self._tensors("status", bases_of(parts))
        return assemble(parts, {part: each.expand(-1, gates, -1) for part, each in stored.items()})

    def counterfactual(self, run: str, parts: Sequence[str]) -> Tensor:
        """[n, E, L - 1, inputs] the same in runs that saw less of the image, or another one, in half precision.

        The run `exits` is those whose image left at one of the E exits that the set was collected with, `swapped` the
        one with another image (E = 1).
        """
        if missing := [part for part in bases_of(parts) if part not in (*TEXT_STATUS, LENS)]:
            raise ConfigError(f"statuses of runs that saw less of the image are of the text, not {missing[0]!r}")
        names = {LENS: f"{run}_lens"} if LENS in bases_of(parts) else {}
        stored = self._tensors("counterfactual", [run, *names.values()])
        base = dict(zip(TEXT_STATUS, stored[run].chunk(2, dim=-1), strict=True))
        return assemble(parts, base | {part: stored[name] for part, name in names.items()})

    @property
    def _settings(self) -> dict[str, Any]:
        return json.loads((self.folder.path / "fingerprint.json").read_text())["settings"]

    @property
    def exits(self) -> list[int]:
        """The exit layers k of `counterfactual("exits", ...)`."""
        return list(self._settings.get("exits", []))

    @property
    def kept(self) -> list[str]:
        """The status parts that the set holds."""
        return list(self._settings["status"])

    def rows_of(self, samples: pd.DataFrame) -> Tensor:
        """Row in this set of every sample of another table, by its id."""
        row = pd.Series(np.arange(len(self)), index=self.samples["id"])
        return torch.from_numpy(row.loc[samples["id"]].to_numpy(copy=True))

    def _tensors(self, name: str, keys: Sequence[str]) -> dict[str, Tensor]:
        try:
            shards = {key: list(self.folder.tensors(name, key)) for key in keys}
        except Exception as error:  # safetensors names the key in an error type of its own
            raise ConfigError(f"the labels in {self.folder.path} do not hold {' and '.join(keys)} ({name})") from error
        if not all(shards.values()):
            raise ConfigError(f"the labels in {self.folder.path} hold no {name}: collect them anew with it")
        return {key: torch.cat(each) for key, each in shards.items()}
