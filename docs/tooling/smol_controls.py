"""What the trainings beside `llava_smol` answer: `python -m docs.tooling.smol_controls outputs/smol/seed1 ...`.

Two more seeds, a decoder without pretraining, the projector alone, questions alone. Each folder is one
run of `dyvte.testbed.smol.train`; its model is put together beside its parts, and its accuracy on the test split's
image questions of one and two hops is added to `docs/testbed_smol/controls.json`, from which
`python -m docs.tooling.smol_findings` writes its table. Runs that are there already are measured anew.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from docs.tooling.smol_evidence import FOLDER, NO_IMAGE, accuracy_by_kind, answered_rightly
from dyvte.errors import DyvteError
from dyvte.loading import load
from dyvte.runs.store import write_json
from dyvte.testbed.smol.assemble import SETTINGS, assemble
from dyvte.testbed.smol.records import EnglishQuestions

NUMBERS = FOLDER / "controls.json"


def measure_control(run: Path, num: int, seed: int) -> dict[str, Any]:
    """Accuracy by kind, perplexity, steps and hours of one training.

    Raises:
        DyvteError: the folder holds no finished training.
    """
    parts, target = run / "parts", run / "model"
    if not (parts / "training.json").is_file():
        raise DyvteError(f"{run} holds no finished training; run python -m dyvte.testbed.smol.train name={run.name}")
    record = json.loads((parts / "training.json").read_text())
    settings = record["settings"]
    assemble(parts, target)
    mllm = load(target, device="cpu", dtype=torch.float32)
    records = list(EnglishQuestions("test", num, seed=seed, paraphrases="known", per_scene=13))
    right = answered_rightly(mllm, records, NO_IMAGE if settings["blind"] else "known", run.name)
    last = {line["stage"]: line["seconds"] for line in record["log"]}
    return {
        "accuracy": accuracy_by_kind(records, right),
        "perplexity": json.loads((target / SETTINGS).read_text())["perplexity_after"],
        "steps": {name: settings["phases"][name]["steps"] for name in settings["order"]},
        "hours": round(sum(last.values()) / 3600, 2),
        **{key: settings[key] for key in ("seed", "rank", "random_decoder", "blind")},
    }


def main() -> None:
    """Measure the runs that are named."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", type=Path, nargs="+", help="folders of trainings")
    parser.add_argument("--num", type=int, default=1040, help="questions")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    found = json.loads(NUMBERS.read_text()) if NUMBERS.is_file() else {}
    for run in options.runs:
        found[run.name] = measure_control(run, options.num, options.seed)
        write_json(NUMBERS, found)
        bar = found[run.name]["accuracy"]["bar"]
        print(f"{run.name}: {bar['accuracy']:.3f} [{bar['low']:.3f}, {bar['high']:.3f}] of one and two hops")


if __name__ == "__main__":
    main()
