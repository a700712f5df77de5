"""Figures: text from data is no markup, nothing is cut off, nothing is drawn over."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from analysis import plots
from analysis.plots.compare import draw_attention_by_depth, draw_exits_by_depth
from dyvte.runs.figures import accuracy_against_flops, exit_of_one_question

LAYERS = 6
MARKUP = r"costs $5 or $x^{ \alpha"
LONG = "questions about the relation of the objects to the left and to the right of each other in the picture"
NAMES = {"plain": "a", "markup": MARKUP, "long": LONG}


def band(*shape: int) -> dict[str, Any]:
    mean = np.random.default_rng(0).random(shape) * 0.8 + 0.1
    return {"mean": mean.tolist(), "low": (mean - 0.1).tolist(), "high": (mean + 0.1).tolist()}


def stages_summary(name: str) -> dict[str, Any]:
    measures = [each + tail for each in ("mass", "mean_score", "enrichment") for tail in ("", "_no_sink")]
    bands = {each: {curve: band(LAYERS) for curve in ("cross", "visual", "text", "answer_cross")} for each in measures}
    reasons = ["no split of the layers holds both a fall and a rise of cross attention above the minimum effect"]
    counts = {"num_samples": 8, "num_images": 3}
    kinds = {f"{name} {i}": {**counts, "bands": bands} for i in range(5)}
    stages = {"verdict": "undetermined", "reasons": reasons, "boundaries": None, "claims": {"valley": "undetermined"}}
    summary = {"model": name, "data": name, "num_layers": LAYERS, **counts, "endpoint": "enrichment_no_sink"}
    return {**summary, "bands": bands, "stages": stages, "kinds": kinds}


def exits_summary(name: str) -> dict[str, Any]:
    def group() -> dict[str, Any]:
        curves = {each: band(LAYERS + 1) for each in ("accuracy", "agreement", "kl", "kl_reverse")}
        exits = {"exit_layers": [1] * (LAYERS + 1), "mean_exit_layer": 2.5}
        depth = {"mean": 2.0, "low": 1.0, "high": 3.0, "counts": [1] * (LAYERS + 1)}
        return {"num_samples": 7, "num_images": 3, "bands": curves, "exit_depth": depth, **exits}

    entropy = {part: {"mean": np.ones((LAYERS + 1, LAYERS)).tolist()} for part in ("matrix", "difference")}
    tokens = {"token": [0, 1], "num_answers": [12, 11], **{each: [1.0, 2.0] for each in ("mean", "low", "high")}}
    return {
        **group(),
        "model": name,
        "data": name,
        "policy": name,
        "num_layers": LAYERS,
        "num_questions": 7,
        "flops_decoder": [1e9 * k for k in range(LAYERS + 1)],
        "k_star_details": [{"eta": 0.003, "layer": 4}, {"eta": 1e-4, "layer": None}],
        "findings": {"contribution_stops": {"exit_layer": 3}},
        "overall": group(),
        "kinds": {f"{name} {i}": group() for i in range(5)},
        "entropy": {"text_entropy": entropy},
        "entropy_change": {name: band(LAYERS - 1) for name in ("signed", "floor", "answers")},
        "tokens": {"questions": tokens, "captions": tokens},
    }


def attention_map(name: str) -> Figure:
    rng = np.random.default_rng(0)
    record = {"maps": rng.random((LAYERS, 4, 4)), "mass": [0.5] * LAYERS, "query": "instruction"}
    record |= {"question": name, "answer": name, "reference": name}
    return plots.draw_attention_map(record, rng.random((24, 24, 3)))


def examples(name: str) -> Figure:
    row = {"question": name, "answer": name, "full_answer": "b", "reference": name, "correct": False, "exit_layer": 2}
    rows = pd.DataFrame([row] * 3)
    return plots.draw_exit_examples([plots.ExitExample(np.zeros((8, 8, 3), int), rows)] * 3, LAYERS, name)


def policies(name: str) -> Figure:
    rows = {"flops_decoder": [1.0, 2.0, 3.0], "accuracy": [0.2, 0.5, 0.9], "agreement": [0.1, 0.4, 1.0]}
    fixed = pd.DataFrame({"exit_layer": [0, 1, 2], **rows})
    limits = {f"{each}_{end}": rows[each] for each in ("accuracy", "agreement") for end in ("low", "high")}
    each = pd.DataFrame({"policy": [f"{name} {i}" for i in range(3)], **rows, **limits})
    many = pd.concat([each, each, each], ignore_index=True)
    return accuracy_against_flops(fixed, many, {"flops_decoder": 1.5, "accuracy": 0.9, "agreement": 1.0}, name)


def one_question(name: str) -> Figure:
    probability = {1: 0.1, 2: 0.4, 3: 0.9}
    return exit_of_one_question(np.zeros((8, 8, 3)), name, name, probability, [0.5] * (LAYERS - 1), 3)


FIGURES: dict[str, Callable[[str], Figure]] = {
    "stages": lambda name: plots.draw_three_stages(stages_summary(name)),
    "measures": lambda name: plots.draw_measures(stages_summary(name)),
    "stages by kind": lambda name: plots.draw_stages_by_kind(stages_summary(name)),
    "scores": lambda name: plots.draw_attention_scores([stages_summary(name)] * 2),
    "attention by depth": lambda name: draw_attention_by_depth({name: stages_summary(name)}),
    "map": attention_map,
    "exits": lambda name: plots.draw_exit_curves(exits_summary(name)),
    "exits by kind": lambda name: plots.draw_exit_curves_by_kind(exits_summary(name)),
    "exits by depth": lambda name: draw_exits_by_depth({name: exits_summary(name)}),
    "kl": lambda name: plots.draw_kl(exits_summary(name)),
    "entropy": lambda name: plots.draw_text_entropy(exits_summary(name)),
    "entropy change": lambda name: plots.draw_entropy_change(exits_summary(name)),
    "depths": lambda name: plots.draw_exit_depths(exits_summary(name)),
    "policy's layers": lambda name: plots.draw_policy_exit_layers(exits_summary(name)),
    "tokens": lambda name: plots.draw_token_depths(exits_summary(name)),
    "examples": examples,
    "policies": policies,
    "one question": one_question,
}


def test_no_panel_of_exits_is_empty() -> None:
    summary = exits_summary("a")
    unknown = summary["overall"]["bands"]["accuracy"]
    without = {key: [None] * len(value) for key, value in unknown.items() if isinstance(value, list)}
    summary["overall"]["bands"]["accuracy"] = {**unknown, **without}
    (panel,) = draw_exits_by_depth({"a": summary}).axes
    assert panel.get_title() == "same answer as the full model"
    assert len(draw_exits_by_depth({"a": exits_summary("a")}).axes) == 2


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", FIGURES)
def test_text_is_shown_as_it_is_and_whole(kind: str, name: str) -> None:
    figure = FIGURES[kind](NAMES[name])
    figure.canvas.draw()  # markup that does not parse would raise here
    width, height = figure.canvas.get_width_height()
    renderer = figure.canvas.get_renderer()
    texts = [each for each in figure.findobj(plt.Text) if each.get_visible() and each.get_text().strip()]
    if name == "markup":
        assert not [each for each in texts if "$" in each.get_text() and each.get_parse_math()]
    for text in texts:
        if re.fullmatch(r"[−\d.,e]+[%kMG]?", text.get_text().replace(" ", "")):
            continue  # axes also hold the numbers beyond their ends, which are not drawn
        box = text.get_window_extent(renderer)
        inside = box.x0 >= -2 and box.y0 >= -2 and box.x1 <= width + 2 and box.y1 <= height + 2
        assert inside, f"{text.get_text()!r} leaves the figure: {box} of {width} x {height}"
    plt.close(figure)
