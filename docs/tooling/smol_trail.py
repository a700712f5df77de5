"""Whether training fills the valley of attention: `python -m docs.tooling.smol_trail outputs/smol/main/find.pt ...`.

Each file is the checkpoint of a finished phase of `dyvte.testbed.smol.train`, in the order of training. Its model is
put together, `analysis.stages` looks at it, and what H1's rule reads (`docs.tooling.smol_findings`) goes to
`docs/testbed_smol/trail.json`, a row a phase. Looked at after H1 and H6 had come out, and registered nowhere.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from analysis.measuring.attention import measure_attention
from analysis.measuring.runs import measure_dataset
from analysis.plots import style as plots
from docs.tooling.smol_findings import FIGURES, TRAIL, sides_of_valley
from dyvte.data import build_dataset
from dyvte.runs.config import compose, load_model
from dyvte.runs.store import write_atomic, write_json
from dyvte.testbed.smol.assemble import SETTINGS, assemble, export_parts

WORK = Path("outputs/smol/trail")
"""Parts and model of one phase at a time."""


def look_after(checkpoint: Path, num: int) -> dict[str, Any]:
    """One phase: its steps, what the trainer's last check of it said, and both sides of the valley."""
    name = checkpoint.stem
    stored = torch.load(checkpoint, map_location="cpu", weights_only=True)
    modules = stored["modules"]
    export_parts(modules["projector"], modules.get("adapter"), WORK / "parts", {})
    assemble(WORK / "parts", WORK / "model")
    chosen = ["model=llava_smol", f"model.path={WORK / 'model'}", f"model.name=llava_smol_after_{name}"]
    cfg = compose("stages", [*chosen, "data=english", f"data.limit={num}"])
    mllm = load_model(cfg)
    folder = measure_dataset(cfg, mllm, build_dataset(cfg.data), partial(measure_attention, mllm))
    assert folder is not None
    rises = sides_of_valley(folder.read_table("layers"))
    last = json.loads(checkpoint.with_suffix(".jsonl").read_text().splitlines()[-1])
    return {
        "phase": name,
        "steps": stored["step"],
        "accuracy": last["accuracy"],
        "perplexity": json.loads((WORK / "model" / SETTINGS).read_text())["perplexity_after"],
        "questions": num,
        **{side: [math.exp(each) for each in rise] for side, rise in rises.items()},
    }


def draw_trail(found: Sequence[Mapping[str, Any]]) -> Figure:
    """Both sides of the valley, and accuracy, over the steps of training."""
    steps = [sum(row["steps"] for row in found[: index + 1]) for index in range(len(found))]
    with plots.figure_style():
        figure, (top, bottom) = plt.subplots(2, 1, figsize=(6.4, 4.8), sharex=True)
        for series, side, name in zip(
            plots.CYCLE, ("first", "last"), ("layers 0 to 4", "layers 20 to 29"), strict=False
        ):
            middle, low, high = np.array([row[side] for row in found]).T
            plots.draw_line(top, steps, middle, series.named(name))
            top.fill_between(steps, low, high, color=series.color, alpha=0.22, linewidth=0)
        top.axhline(1, color="0.6", linewidth=0.8)
        top.set(ylabel="attention on the image,\nover layers 5 to 19", ylim=(0, None))
        top.legend()
        accuracy = [row["accuracy"] for row in found]
        plots.draw_line(bottom, steps, accuracy, plots.CYCLE[2])
        bottom.set(xlabel="training steps; points: ends of phases", ylabel="validation accuracy", ylim=(0, 1))
        for step, row in zip(steps, found, strict=True):
            place = {"xytext": (4, -11), "textcoords": "offset points", "fontsize": "small"}
            bottom.annotate(row["phase"], (step, row["accuracy"]), **place)
        title = f"llava_smol in training, {found[0]['questions']} questions, one-sided 95% limits"
        figure.suptitle(title, fontsize="medium")
        figure.tight_layout()
    return figure


def main() -> None:
    """Look at every checkpoint that is named, keep what was found, and draw it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "checkpoints", type=Path, nargs="*", help="of finished phases, in order; none: draw what is there"
    )
    parser.add_argument("--num", type=int, default=128, help="questions")
    options = parser.parse_args()
    found = []
    for checkpoint in options.checkpoints:
        found.append(look_after(checkpoint, options.num))
        write_json(TRAIL, found)
        print(found[-1])
    figure = draw_trail(found or json.loads(TRAIL.read_text()))
    write_atomic(FIGURES / "valley.png", lambda out: figure.savefig(out, format="png", metadata={"Software": None}))


if __name__ == "__main__":
    main()
