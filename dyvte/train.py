"""`python -m dyvte.train`: label a set of questions under every exit, then train the gates of all layers."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from dyvte.data.base import build_dataset
from dyvte.errors import ConfigError, DataError
from dyvte.gates.controls import QUESTION_GATES
from dyvte.gates.counterfactual import exits_for, other_runs
from dyvte.gates.features import QUESTION
from dyvte.gates.labels import LabelSet, LabelSettings, collect_labels
from dyvte.gates.metrics import at_exit, exit_by_kind, first_exit, layer_report, mixture_cost, thresholds_by_depth
from dyvte.gates.module import Gates
from dyvte.gates.objectives import GateData, Recipe
from dyvte.gates.risk import choose_threshold, too_few_images, upper_limit
from dyvte.gates.teacher import taught
from dyvte.gates.training import average_gates, evaluate_loss, gate_probabilities, train_gates
from dyvte.gates.validation import cost_at_agreement, use_of_image
from dyvte.mllm import MLLM
from dyvte.runs import distributed
from dyvte.runs.config import command, load_model
from dyvte.runs.locks import replace_folder, temporary_name
from dyvte.runs.store import RunFolder
from dyvte.runs.targets import build, find_target
from dyvte.runs.terminal import progress

STOPPING_SHARE = 0.1
"""Share of the images, of those that the threshold is not chosen on, that say when training stops."""


@command("train")
def main(cfg: DictConfig) -> str | None:
    """Train gates as `conf/train.yaml` says."""
    gates = train(cfg)
    return gates_in_words(gates.facts["validation"], cfg.output_dir) if gates else None


def train(cfg: DictConfig) -> Gates | None:
    """Collect or finish the label set, train, choose the threshold, save; None in all processes but the first."""
    mllm = load_model(cfg)
    dataset = build_dataset(cfg.data)
    settings = label_settings(cfg.labels, cfg.recipe.training.counterfactual, mllm.num_layers)
    labels = collect_labels(mllm, dataset, cfg, cfg.labels.dir, settings)
    made_of = json.loads((labels.folder.path / "fingerprint.json").read_text())
    run_settings = {
        "recipe": OmegaConf.to_container(cfg.recipe, resolve=True),
        "seed": cfg.seed,
        "validation_share": cfg.validation_share,
        "train_samples": cfg.train_samples,
    }
    folder = RunFolder.open(cfg.output_dir, {"labels": made_of, "training": run_settings}, cfg, cfg.overwrite)
    if not distributed.is_main():
        return None
    started = time.perf_counter()
    split = split_labels(labels, cfg)
    _check_bound(split, cfg)
    fit = fit_gates(mllm, split, cfg, list(cfg.recipe.status), folder)
    fit.gates.facts = {
        "model": cfg.model.name,
        "data": cfg.data.name,
        "recipe": _short_recipe(cfg),
        "validation": fit.validation,
        "controls": _fixed_exits(split, fit.validation["agreement"]),
    }
    control = None
    if QUESTION in settings.status:
        fit_control = fit_gates(mllm, split, cfg, [QUESTION])
        control = fit_control.gates
        control.facts = {**fit.gates.facts, "validation": fit_control.validation}
    save_gates(folder.path / "gates", fit.gates, control)
    folder.write_table("layers", fit.report)
    folder.write_table("history", fit.history)
    training = time.perf_counter() - started
    folder.write_summary(
        model=cfg.model.name,
        data=cfg.data.name,
        num_layers=mllm.num_layers,
        seconds=round(labels.folder.seconds + training, 3),
        num_samples=len(labels),
        num_failed=len(labels.folder.failures()),
        recipe=cfg.recipe.name,
        training_seconds=round(training, 2),
        **fit.gates.facts["controls"],
        **fit.validation,
    )
    print(fit.report.to_string(index=False, float_format=lambda value: f"{value:.3f}"))
    print(outline(fit.validation, cfg.recipe.training.get("members", 1)))
    print(f"gates: {folder.path / 'gates'}")
    if cfg.comparison_dir is not None:
        compare(Path(cfg.comparison_dir))
    return fit.gates


def gates_in_words(validation: Mapping[str, Any], folder: str) -> str:
    """What gates reach on the questions held out for them, and how to go on."""
    return (
        f"on held-out questions the gates keep {validation['agreement']:.1%} of the answers at "
        f"{validation['cost']:.0%} of the decoder's FLOPs (best fixed exits: {validation['cost_of_fixed_exits']:.0%}). "
        f"Next: python -m dyvte.evaluate policy=dynamic_exit policy.gates={folder}/gates"
    )


def label_settings(labels: DictConfig, counterfactual: Sequence[str] = (), num_layers: int = 0) -> LabelSettings:
    """What a label set holds, from the block `labels` of a configuration.

    The runs `counterfactual`, which a recipe trains on, are kept where `labels.exits` and `labels.swapped` are null.
    """
    exits = exits_for(counterfactual, num_layers) if labels.exits is None else labels.exits
    swapped = "swapped" in counterfactual if labels.swapped is None else labels.swapped
    return LabelSettings(
        labels.max_new_tokens,
        tuple(labels.status),
        exits=tuple(exits),
        swapped=bool(swapped),
        ground_truth=bool(labels.ground_truth),
    )


@dataclass(frozen=True)
class Split:
    """A label set in three parts that share no image.

    Attributes:
        labels: the set.
        rule: [n, L + 1] labels after the recipe's rule.
        train: rows that gates learn from.
        stopping: rows that say when to stop.
        validation: rows that the threshold is chosen on; nothing that they could have shaped is measured on them.
    """

    labels: LabelSet
    rule: Tensor
    train: Tensor
    stopping: Tensor
    validation: Tensor

    def data(self, recipe: Recipe, parts: Sequence[str]) -> GateData:
        """What gates learn from that look at some parts, and are asked on: all rows of the set."""
        of_text = QUESTION not in parts
        return GateData(
            self.labels.status(parts),
            self.rule,
            self.labels.cost.float(),
            kinds=torch.from_numpy(pd.factorize(self.labels.samples["kind"].astype(str))[0]),
            taught=taught(self.labels, self.rule, self.train) if of_text and recipe.distill else None,
            others=other_runs(self.labels, self.rule, recipe.counterfactual, parts) if of_text else None,
        )

    def column(self, name: str, rows: Tensor) -> list[Any]:
        """A column of the sample table."""
        return list(self.labels.samples[name].iloc[rows.numpy()])


def split_labels(labels: LabelSet, cfg: DictConfig) -> Split:
    """Questions with an image, split by image; the part that an image falls into depends on its id and the seed alone.

    The threshold takes `validation_share` of the images, early stopping `STOPPING_SHARE` of the others.
    """
    if not 0 < cfg.validation_share < 1:
        raise ConfigError(f"validation_share is {cfg.validation_share}; give a number between 0 and 1")
    share = torch.tensor([_hash_share(f"{cfg.seed} {image}") for image in labels.samples["image_id"]])
    learning = cfg.validation_share + (1 - cfg.validation_share) * STOPPING_SHARE
    validation, stopping, train = (
        (part & labels.has_image).nonzero().flatten()
        for part in (
            share < cfg.validation_share,
            (cfg.validation_share <= share) & (share < learning),
            learning <= share,
        )
    )
    if cfg.train_samples is not None:
        train = train[: cfg.train_samples]
    if not (len(train) and len(stopping) and len(validation)):
        raise DataError(
            f"{len(train)} questions to train on, {len(stopping)} to stop on and {len(validation)} to choose the "
            f"threshold on; each part needs some with an image: give more questions (data.limit)"
        )
    rule = labels.labels(cfg.recipe.rule, cfg.recipe.ratio, cfg.recipe.eps)
    return Split(labels, rule, train, stopping, validation)


def _check_bound(split: Split, cfg: DictConfig) -> None:
    """Raise where no threshold could keep the recipe's bounds, whatever the gates: too few images to show it."""
    recipe, rows = cfg.recipe, split.validation
    if recipe.threshold != "auto":
        return
    for key in ("bound", "kind_bound"):
        if recipe[key] is not None and not 0 < recipe[key] < 1:
            raise ConfigError(f"recipe.{key} is {recipe[key]}; give a share between 0 and 1")
    images, kinds = split.column("image_id", rows), split.column("kind", rows)
    lacking = too_few_images(images, recipe.bound, recipe.confidence, kinds, recipe.kind_bound)
    if lacking is None:
        return
    key, of_kind = ("bound", "") if lacking.kind is None else ("kind_bound", f" of kind {lacking.kind!r}")
    asked = math.ceil(lacking.needed / lacking.present * len(split.labels))
    raise DataError(
        f"gates not trained: {lacking.present} validation images{of_kind} cannot show that at most {lacking.bound:.3g} "
        f"of the answers change (recipe.{key}); {lacking.needed} can, about {asked} questions in all (data.limit); or "
        f"set recipe.{key}={math.ceil(1000 * lacking.reachable) / 1000:.3g} or a recipe.threshold of your own, such as "
        f"0.9"
    )


def _hash_share(text: str) -> float:
    return int(hashlib.sha256(text.encode()).hexdigest()[:12], 16) / 16**12


@dataclass(frozen=True)
class GateFit:
    """Trained gates, their report by layer, the losses on the way, and what they reach on the validation questions."""

    gates: Gates
    report: pd.DataFrame
    history: pd.DataFrame
    validation: dict[str, Any]


def outline(validation: Mapping[str, Any], members: int) -> str:
    """What training came to, for the terminal; all numbers are in `summary.json`."""
    epochs = f"{validation['epochs']} epochs"
    if members > 1:
        epochs += f" of {members} gates a layer together"
    of = validation
    lines = [
        f"trained on {of['train_questions']:,} questions, {epochs}; loss {of['validation_loss']:.4f} on "
        f"{of['validation_questions']:,} validation questions on {of['validation_images']:,} images, where",
        f"gates exit after {of['mean_exit_layer']:.2f} layers on average (threshold {of['threshold']:.3f}); "
        f"{of['agreement']:.1%} of the answers stay, at most {of['disagreement_upper_limit']:.1%} change;",
        f"FLOPs, in full prefills of the mean question: {of['cost']:.3f}; fixed exits that keep as many answers "
        f"{of['cost_of_fixed_exits']:.3f}, with hindsight {of['cost_of_oracle']:.3f}",
    ]
    return "\n".join(lines)


def fit_gates(mllm: MLLM, split: Split, cfg: DictConfig, parts: list[str], folder: RunFolder | None = None) -> GateFit:
    """Train gates that look at some status parts; with a folder, log to TensorBoard there and show progress."""
    settings: Any = OmegaConf.to_container(cfg.recipe, resolve=True)
    recipe: Recipe = build(settings["training"], Recipe)
    optimizer = {key: value for key, value in settings["optimizer"].items() if key != "_partial_"}
    make_optimizer = functools.partial(find_target(optimizer.pop("_target_"), torch.optim.Optimizer), **optimizer)
    data = split.data(recipe, parts)
    train_data, stopping, validation = (data[rows] for rows in (split.train, split.stopping, split.validation))
    history: list[dict[str, float]] = []
    writer = None
    if folder is not None:
        shutil.rmtree(folder.path / "tensorboard", ignore_errors=True)
        writer = SummaryWriter(str(folder.path / "tensorboard"))
    members, results = [], []
    total = recipe.epochs * recipe.members
    with progress("training gates", "epochs", total, disable=writer is None) as bar:
        for member in range(recipe.members):
            torch.manual_seed(cfg.seed + member)
            gates = Gates(
                mllm.num_layers,
                mllm.hidden_size,
                parts,
                cfg.recipe.width,
                cfg.recipe.bias,
                shared=cfg.recipe.shared,
                cumulative=recipe.objective == "hazard",
            ).to(mllm.device)

            def log(epoch: int, losses: dict[str, float], gates: Gates = gates, member: int = member) -> None:
                history.append({"member": member, "epoch": epoch, **losses})
                bar.update()
                bar.set_postfix({name: f"{value:.4f}" for name, value in losses.items()})
                if writer is not None:
                    _write_scalars(writer, f"member_{member}", epoch, losses, gates, stopping)

            results.append(train_gates(gates, train_data, stopping, recipe, make_optimizer, cfg.seed + member, log))
            members.append(gates)
    if writer is not None:
        writer.close()
    gates = average_gates(members)
    probability = gate_probabilities(gates, validation.status)
    agree, cost = split.labels.agree[split.validation], split.labels.cost[split.validation]
    images = split.column("image_id", split.validation)
    threshold, caution = cfg.recipe.threshold, cfg.recipe.caution
    if threshold == "auto":
        kinds = split.column("kind", split.validation)
        bounds = cfg.recipe.bound, cfg.recipe.confidence, caution, kinds, cfg.recipe.kind_bound
        threshold, _, needed = choose_threshold(probability, agree, images, *bounds)
        if threshold >= 1 and folder is not None:
            enough = "however many there were" if needed is None else f"{needed} would, if they were alike"
            raise DataError(
                f"gates not saved, they would never exit: under no threshold do {len(set(images))} validation images "
                f"show that at most {cfg.recipe.bound:.3g} of the answers change; {enough} (train on more questions, "
                f"data.limit, or set a larger recipe.bound)"
            )
    gates.threshold = thresholds_by_depth(float(threshold), mllm.num_layers, caution)
    exits = first_exit(probability, gates.thresholds())
    agreement = float(at_exit(agree, exits).double().mean())
    result = {
        "epochs": sum(each["epochs"] for each in results),
        "validation_loss": evaluate_loss(gates, validation, recipe),
        "train_questions": len(split.train),
        "stopping_questions": len(split.stopping),
        "validation_questions": len(split.validation),
        "validation_images": len(set(images)),
        "threshold": float(threshold),
        "agreement": agreement,
        "disagreement_upper_limit": upper_limit(~at_exit(agree, exits), images, cfg.recipe.confidence),
        "mean_exit_layer": float(exits.double().mean()),
        "cost": float(at_exit(cost, exits).mean()),
        "cost_of_fixed_exits": mixture_cost(cost.mean(0), agree.double().mean(0), agreement),
        "cost_of_oracle": float(at_exit(cost, agree.int().argmax(1)).mean()),
        **cost_at_agreement(probability, agree, cost, caution),
        **use_of_image(gates, split.labels, split.validation),
    }
    report = layer_report(probability, validation.labels[:, 1:-1], gates.thresholds())
    return GateFit(gates.cpu(), report, pd.DataFrame(history), result)


def _write_scalars(
    writer: SummaryWriter, prefix: str, epoch: int, losses: dict[str, float], gates: Gates, validation: GateData
) -> None:
    """Losses and the report by layer, to TensorBoard."""
    for name, value in losses.items():
        writer.add_scalar(f"{prefix}/{name}", value, epoch)
    probability = gate_probabilities(gates, validation.status)
    table = layer_report(probability, validation.labels[:, 1:-1], [0.5] * len(gates))
    for row in table.to_dict("records"):
        for column, number in row.items():
            writer.add_scalar(f"{prefix}_{column}/exit_{int(row['exit_layer']):02d}", number, epoch)


def compare(path: Path) -> pd.DataFrame:
    """One table of the runs below `path`: what each reached on its validation questions."""
    rows = []
    for file in sorted(path.glob("*/summary.json")):
        summary = json.loads(file.read_text())
        numbers = {key: value for key, value in summary.items() if isinstance(value, (int, float))}
        rows.append({"run": file.parent.name, **numbers})
    table = pd.DataFrame(rows).drop(columns=["num_layers", "num_failed", "seconds"])
    RunFolder(path).write_table("comparison", table)
    print(f"comparison: {path / 'comparison.csv'}")
    return table


def _fixed_exits(split: Split, agreement: float) -> dict[str, Any]:
    """Fixed exits chosen on the validation questions to reach the gates' agreement there: one, and one a kind."""
    agree, cost = split.labels.agree[split.validation], split.labels.cost[split.validation]
    reaches = (agree.double().mean(0) >= agreement).nonzero().flatten()
    return {
        "fixed_exit": int(reaches[0]),
        "fixed_exit_by_kind": exit_by_kind(agree, cost, split.column("kind", split.validation), agreement),
    }


def _short_recipe(cfg: DictConfig) -> dict[str, Any]:
    recipe: Any = OmegaConf.to_container(cfg.recipe, resolve=True)
    optimizer = recipe.pop("optimizer")
    training = recipe.pop("training")
    return {
        **{key: value for key, value in training.items() if not key.startswith("_")},
        **recipe,
        "optimizer": optimizer.pop("_target_").rpartition(".")[2],
        **{key: value for key, value in optimizer.items() if not key.startswith("_")},
    }


def save_gates(folder: Path, gates: Gates, control: Gates | None = None) -> None:
    """Write a folder of gates, with the control that saw the question only: complete or not there."""
    temporary = temporary_name(folder)
    try:
        gates.save_pretrained(temporary)
        if control is not None:
            control.save_pretrained(temporary / QUESTION_GATES)
        replace_folder(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


if __name__ == "__main__":
    main()
