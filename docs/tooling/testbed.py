"""What the shipped testbed can do, and what it cannot know: ``python -m docs.tooling.testbed`` (``make testbed-eval``).

Evaluates the shipped weights on held-out questions (with the image, with a blank one, with another scene's), fits
linear probes to the decoder's input, and writes the model card, ``docs/testbed.md`` and its figures, together with what
the recorded training runs showed (``docs/tooling/testbed_runs.py``).
"""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from omegaconf import DictConfig
from PIL import Image

from analysis.in_notebook import show
from analysis.plots import style as plots
from analysis.plots.attention import MEASURE_LABELS
from analysis.statistics.bands import Band
from docs.tooling.generated import write_generated
from docs.tooling.testbed_card import (
    CONDITIONS,
    REQUIRED_KIND,
    REQUIRED_OVERALL,
    accuracy_markdown,
    documents,
    interval,
)
from docs.tooling.testbed_probes import probe_report
from docs.tooling.testbed_runs import accuracy_table, answer
from dyvte.loading import load
from dyvte.mllm import MLLM
from dyvte.runs.config import command
from dyvte.runs.store import write_json
from dyvte.testbed.questions import IMAGE_KINDS, KINDS, ShapesQuestions
from dyvte.testbed.world import IMAGE_SIZE

COMMAND = "make testbed-eval"


# ---------------------------------------------------------------- evaluation
def evaluate(mllm: MLLM, cfg: DictConfig) -> dict[str, Any]:
    """Accuracy under three conditions, accuracy by hops on matched questions, and the linear probes."""
    started = time.monotonic()
    records = list(ShapesQuestions("test", cfg.num_questions, seed=cfg.seed))
    images = [r.image() for r in records]
    blank = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), (128, 128, 128))
    ids = [r.image_id for r in records]
    count = len(records)
    # the image of the next scene that is not the question's own
    next_scene = [next(j % count for j in range(i + 1, i + count) if ids[j % count] != ids[i]) for i in range(count)]
    other = [images[j] for j in next_scene]
    inputs = {"image": images, "blank": [blank] * len(records), "other": other}
    result: dict[str, Any] = {"accuracy": {}}
    for title, key in CONDITIONS.items():
        answers = answer(mllm, records, inputs[key], cfg.batch_size, title)
        result["accuracy"][key] = accuracy_table(records, answers)
        if key == "blank":
            said = [given for given, record in zip(answers, records, strict=True) if record.kind in IMAGE_KINDS]
            most, times = Counter(said).most_common(1)[0]
            result["said_to_blank"] = {"answer": most, "share": times / len(said)}
    matched = list(ShapesQuestions("test", cfg.num_matched, seed=cfg.seed + 1, matched=True))
    answers = answer(mllm, matched, [r.image() for r in matched], cfg.batch_size, "matched")
    result["matched"] = accuracy_table(matched, answers)
    result["probes"] = probe_report(mllm, cfg.probe_scenes, cfg.batch_size, cfg.seed)
    truth = np.array([r.answer for r in records])
    kinds = np.array([r.kind for r in records])
    asked = np.array([r.question.split()[-2] if r.question.startswith("from") else "" for r in records])
    majority = {}
    for kind in KINDS:  # the best constant answer, told which attribute is asked
        mine = kinds == kind
        best = [np.unique(truth[mine & (asked == a)], return_counts=True)[1].max() for a in np.unique(asked[mine])]
        majority[kind] = float(np.sum(best) / mine.sum())
    majority["image"] = float(np.mean([majority[k] for k in IMAGE_KINDS]))
    result["majority"] = majority
    result["seconds"] = round(time.monotonic() - started, 1)
    image = result["accuracy"]["image"]
    low = {k: image[k]["accuracy"] for k in IMAGE_KINDS if KINDS[k] <= 2 and image[k]["accuracy"] < REQUIRED_KIND}
    result["bar"] = {"met": image["image"]["accuracy"] >= REQUIRED_OVERALL and not low, "kinds_below": low}
    return result


# ---------------------------------------------------------------- figures
def training_figure(runs: dict[str, dict[str, Any]]) -> Figure:
    """Validation accuracy while instructing, one line a run."""
    with plots.figure_style():
        figure, axis = plt.subplots(figsize=(6.2, 3.2))
        for series, (name, run) in zip(plots.CYCLE, runs.items(), strict=False):
            lines = [x for x in run["logs"].get("instruct", []) if "accuracy" in x]
            steps, accuracy = [x["step"] for x in lines], [x["accuracy"] for x in lines]
            axis.plot(
                steps, accuracy, label=name, color=series.color, linestyle=series.linestyle, marker=series.marker,
                markevery=max(len(steps) // 8, 1),
            )  # fmt: skip
        axis.axhline(REQUIRED_OVERALL, color="0.6", linewidth=0.8)
        axis.set(
            xlabel="instruction step", ylabel="accuracy on validation scenes\n(mean over image kinds)", ylim=(0, 1.02)
        )
        axis.legend(title="training run", loc="lower right")
        figure.tight_layout()
    return figure


def attention_figure(runs: dict[str, dict[str, Any]], measure: str) -> Figure:
    """The three attention curves, a row per run and a column per training stage, with 95% bands."""
    columns = {
        "language": "after stage 0\n(language only)",
        "align": "after stage 2\n(aligned)",
        "instruct": "after stage 3\n(instructed)",
    }
    runs = {name: run for name, run in runs.items() if run["attention"]}
    with plots.figure_style():
        figure, axes = plt.subplots(
            len(runs), len(columns), figsize=(7.2, 1.75 * len(runs) + 0.9), sharex=True, sharey=True, squeeze=False
        )
        for row, (name, run) in enumerate(runs.items()):
            for column, (stage, title) in enumerate(columns.items()):
                axis = axes[row, column]
                curves = run["attention"].get(stage)
                if measure != "mass":
                    axis.axhline(1, color="0.6", linewidth=0.8)
                if curves is None:
                    axis.text(
                        0.5, 0.5, "stage left out", ha="center", va="center", transform=axis.transAxes, color="0.4"
                    )
                else:
                    for curve, values in curves[measure].items():
                        band = Band.from_dict(values)
                        plots.draw_band(axis, band, plots.ATTENTION_SERIES[curve])
                if row == 0:
                    axis.set_title(title)
                if row == len(runs) - 1:
                    axis.set_xlabel("decoder layer")
                if column == 0:
                    axis.set_ylabel(name)
        if measure != "mass":  # the text's enrichment is many times the image's
            plots.ratio_axis(axes[0, 0])
        handles, labels = axes[0, -1].get_legend_handles_labels()
        figure.legend(handles, labels, loc="lower center", ncols=3)
        figure.supylabel(MEASURE_LABELS[measure.removesuffix("_no_sink")], fontsize="medium")
        figure.tight_layout(rect=(0, 0.35 / figure.get_figheight(), 1, 1))
    return figure


def world_figure(num: int = 4) -> Figure:
    """Scenes with one question of growing depth each."""
    records = list(ShapesQuestions("test", 4 * num, seed=3, matched=True))
    with plots.figure_style():
        figure, axes = plt.subplots(1, num, figsize=(2.3 * num, 3.1))
        for axis, start in zip(axes, range(0, 4 * num, 4), strict=True):
            group = records[start : start + 4]
            axis.imshow(group[0].image())
            axis.set_axis_off()
            lines = [r.question.replace(" then", "\n   then") + "  " + r.answer for r in (group[0], group[-1])]
            axis.text(0, -0.06, "\n".join(lines), transform=axis.transAxes, va="top", fontsize=7)
        figure.subplots_adjust(left=0.01, right=0.99, top=0.98, bottom=0.3, wspace=0.08)
    return figure


@command("testbed_eval")
def main(cfg: DictConfig) -> None:
    """Evaluate the testbed and write its card and documentation."""
    mllm = load(cfg.model, device="cpu", dtype=torch.float32)
    result = evaluate(mllm, cfg)
    order = ("main", "seed1", "seed2", "no_language", "blind")
    found = {p.stem: json.loads(p.read_text()) for p in sorted(Path(cfg.runs).glob("*.json"))}
    runs = {name: found[name] for name in sorted(found, key=lambda n: order.index(n) if n in order else len(order))}
    docs = Path(cfg.docs)
    (docs / "testbed").mkdir(parents=True, exist_ok=True)
    write_json(docs / "testbed" / "evaluation.json", result)
    figures = {
        "world": world_figure(),
        "training": training_figure(runs),
        "attention_mass": attention_figure(runs, "mass"),
        "attention_enrichment": attention_figure(runs, "enrichment_no_sink"),
    }
    for name, figure in figures.items():
        write_generated(docs / "testbed" / f"{name}.png", show(figure).png, COMMAND, ("weights",))
    card, page = documents(result, runs, sum(p.numel() for p in mllm.model.parameters()))
    write_generated(cfg.card, card, COMMAND, ("weights",))
    write_generated(docs / "testbed.md", page, COMMAND, ("weights",))
    image = result["accuracy"]["image"]["image"]
    print(accuracy_markdown(result, runs.get("blind")))
    print(
        f"image questions: {interval(image)}; bar {'met' if result['bar']['met'] else 'NOT met'}; {docs / 'testbed.md'}"
    )


if __name__ == "__main__":
    main()
