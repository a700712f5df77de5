"""Whether training fills the valley of attention: `python -m docs.tooling.smol_trail outputs/smol/main/find.pt ...`.

Each file is the checkpoint of a finished phase of `dyvte.testbed.smol.train`, in the order of training. Its model is
put together, `analysis.stages` looks at it, and what H1's rule reads (`docs.tooling.smol_findings`) goes to
`docs/testbed_smol/trail.json`, a row a phase. Looked at after H1 and H6 had come out, and registered nowhere.
"""

from __future__ import annotations

import argparse
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import torch

from analysis.measuring.attention import measure_attention
from analysis.measuring.runs import measure_dataset
from docs.tooling.smol_findings import TRAIL, sides_of_valley
from dyvte.data import build_dataset
from dyvte.runs.config import compose, load_model
from dyvte.runs.store import write_json
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


def main() -> None:
    """Look at every checkpoint that is named, and keep what was found."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoints", type=Path, nargs="+", help="of finished phases, in order")
    parser.add_argument("--num", type=int, default=128, help="questions")
    options = parser.parse_args()
    found = []
    for checkpoint in options.checkpoints:
        found.append(look_after(checkpoint, options.num))
        write_json(TRAIL, found)
        print(found[-1])


if __name__ == "__main__":
    main()
