"""What `llava_smol` can do: `python -m docs.tooling.smol_evidence` (`make smol-eval`).

Accuracy by kind on held-out scenes, in the wordings of training and in held-out ones, with controls (a blank image,
another scene's), by hops on matched questions; linear probes; the text's perplexity; training curves. Writes
`docs/testbed_smol.md` and `docs/testbed_smol/`.

An answer counts as right if every token of the reference and the end token is the most likely one given those before,
which is the same as greedy decoding giving exactly the reference. All questions on a scene share one packed sequence.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from jinja2 import Environment, StrictUndefined
from torch import Tensor
from tqdm import tqdm

from analysis.plots import style as plots
from analysis.statistics.bands import rate_band
from docs.tooling.testbed_probes import probe_report
from dyvte.loading import load
from dyvte.mllm import MLLM
from dyvte.runs.store import write_atomic, write_json
from dyvte.testbed.packing import Branch, pack
from dyvte.testbed.smol.assemble import PARTS, SETTINGS, assembled_folder
from dyvte.testbed.smol.base import ASSISTANT, EOS, HEAD, IMAGE
from dyvte.testbed.smol.questions import IMAGE_KINDS, KINDS
from dyvte.testbed.smol.records import EnglishQuestions, EnglishRecord
from dyvte.testbed.training.batches import pixels
from dyvte.testbed.training.forward import hidden_states, visual_features

PAGE = Path("docs/testbed_smol.md")
FOLDER = Path("docs/testbed_smol")
TEMPLATE = Path(__file__).with_name("smol_page.md.j2")
REQUIRED_OVERALL, REQUIRED_KIND = 0.90, 0.80
BAR_KINDS = tuple(k for k in IMAGE_KINDS if KINDS[k] <= 2)
CONDITIONS = {
    "known": "image, wordings of training",
    "held_out": "image, held-out wordings",
    "blank": "blank image",
    "other": "another scene's image",
}
NO_IMAGE = "no image"
"""Condition of a model that was trained on questions alone: its prompt holds no image token."""


@torch.no_grad()
def answered_rightly(
    mllm: MLLM, records: Sequence[EnglishRecord], condition: str, title: str, scenes_a_batch: int = 6
) -> np.ndarray:
    """Whether each record is answered exactly [n]; "blank" and "other" change the image, NO_IMAGE drops it."""
    model, tokenizer = mllm.model, mllm.processor.tokenizer

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    by_scene: dict[str, list[int]] = {}
    for i, record in enumerate(records):
        by_scene.setdefault(record.scene.image_id, []).append(i)
    groups = list(by_scene.values())
    prefix = ids(HEAD) + ([] if condition == NO_IMAGE else ids(IMAGE) * model.config.image_seq_length)
    right = np.zeros(len(records), dtype=bool)
    for start in tqdm(range(0, len(groups), scenes_a_batch), desc=title, unit="batch", mininterval=5.0):
        part = groups[start : start + scenes_a_batch]
        branches = []
        for members in part:
            asked = [records[i].question for i in members]
            branches.append([Branch(str(n), ids(q.text + ASSISTANT), ids(q.answer + EOS)) for n, q in enumerate(asked)])
        length = max(len(prefix) + sum(len(b.prompt) + len(b.answer) for b in row) for row in branches)
        batch = pack([(prefix, row) for row in branches], length, tokenizer.pad_token_id)
        images = None if condition == NO_IMAGE else _images(records, groups, range(start, start + len(part)), condition)
        features = None if images is None else visual_features(model, images)
        states = hidden_states(model, model.model.language_model, batch, features)
        chosen = batch.labels >= 0
        hit = torch.zeros_like(chosen)
        hit[chosen] = model.lm_head(states[chosen]).argmax(-1) == batch.labels[chosen]
        for row, members in enumerate(part):
            for number, i in enumerate(members, start=1):
                mine = (batch.branch[row] == number) & chosen[row]
                right[i] = bool(hit[row][mine].all())
    return right


def _images(records: Sequence[EnglishRecord], groups: list[list[int]], rows: range, condition: str) -> Tensor:
    if condition == "blank":
        return torch.full((len(rows), 3, 96, 96), 128 / 127.5 - 1)
    shift = 1 if condition == "other" else 0
    return pixels([records[groups[(row + shift) % len(groups)][0]].scene for row in rows])


def accuracy_by_kind(records: Sequence[EnglishRecord], right: np.ndarray) -> dict[str, dict[str, float]]:
    """Accuracy and 95% interval, clustered by scene, of every kind, of all image kinds, of those of the bar."""
    kinds = np.array([r.question.kind for r in records])
    groups = {kind: kinds == kind for kind in KINDS if (kinds == kind).any()}
    groups |= {"image": np.isin(kinds, IMAGE_KINDS), "bar": np.isin(kinds, BAR_KINDS)}
    return {name: _accuracy(records, right, mine) for name, mine in groups.items()}


def _accuracy(records: Sequence[EnglishRecord], right: np.ndarray, mine: np.ndarray) -> dict[str, float]:
    scenes = np.array([r.scene.image_id for r in records])
    band = rate_band(right[mine].astype(float), scenes[mine])
    limits = {"low": float(band.low), "high": float(band.high)}
    return {"accuracy": float(band.mean), **limits, "n": int(mine.sum())}


def measure_evidence(mllm: MLLM, num: int, seed: int) -> dict[str, Any]:
    """Everything on the page; `num` questions of each set of wordings."""
    sets = {
        p: list(EnglishQuestions("test", num, seed=seed, paraphrases=p, per_scene=13)) for p in ("known", "held_out")
    }
    result: dict[str, Any] = {"accuracy": {}}
    for condition, title in CONDITIONS.items():
        records = sets["held_out" if condition == "held_out" else "known"]
        right = answered_rightly(mllm, records, condition, title)
        result["accuracy"][condition] = accuracy_by_kind(records, right)
    matched = list(EnglishQuestions("test", num, seed=seed + 1, matched=True))
    right = answered_rightly(mllm, matched, "image", "matched")
    hops = np.array([r.question.hops for r in matched])
    result["matched"] = {str(h): _accuracy(matched, right, hops == h) for h in sorted(set(hops.tolist()))}
    result["probes"] = probe_report(mllm, 400, 50, seed)
    result["assembled"] = json.loads((assembled_folder() / SETTINGS).read_text())
    main = result["accuracy"]["known"]
    below = [k for k in BAR_KINDS if main[k]["accuracy"] < REQUIRED_KIND]
    result["bar"] = {"met": main["bar"]["accuracy"] >= REQUIRED_OVERALL and not below, "kinds_below": below}
    return result


def training_figure(log: Sequence[dict[str, Any]]) -> Any:
    """Validation accuracy of the image kinds by training step, the phases one after the other."""
    with plots.figure_style():
        figure, axis = plt.subplots(figsize=(6.4, 3.4))
        steps, offset, last = [], 0, None
        for line in log:
            if last is not None and line["stage"] != last["stage"]:
                offset += last["step"]
                axis.axvline(offset, color="0.8", linewidth=0.8)
            last = line
            steps.append(offset + line["step"])
        for series, hops in zip(plots.CYCLE, (1, 2, 3), strict=False):  # four hops: a handful
            kinds = [k for k in IMAGE_KINDS if KINDS[k] == hops]
            curve = [np.mean([line[k] for k in kinds if k in line]) for line in log]
            axis.plot(steps, curve, label=f"{hops}", color=series.color, linestyle=series.linestyle)
        axis.set(xlabel="training step (lines: phases)", ylabel="accuracy on validation scenes", ylim=(0, 1.02))
        axis.legend(title="hops", loc="lower right")
        figure.tight_layout()
    return figure


def _cell(value: dict[str, float]) -> str:
    return f"{value['accuracy']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"


def write_page(result: dict[str, Any], record: dict[str, Any]) -> str:
    """The page, from what was measured and the training's record."""
    settings = record["settings"]
    last = {line["stage"]: line["seconds"] for line in record["log"]}
    rows = {k: f"`{k}`" for k in KINDS} | {"bar": "**image kinds of 1 or 2 hops**", "image": "**all image kinds**"}
    template = Environment(undefined=StrictUndefined, keep_trailing_newline=True).from_string(TEMPLATE.read_text())
    return template.render(
        result=result, settings=settings, hours=sum(last.values()) / 3600, rows=rows, hops=KINDS, cell=_cell,
        conditions=CONDITIONS, notes=record["notes"],
    )  # fmt: skip


def main() -> None:
    """Measure and write the page, its numbers and its figure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--num", type=int, default=2080, help="questions of each set of wordings")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--page-only", action="store_true", help="write the page again from the numbers that are there")
    options = parser.parse_args()
    if options.page_only:
        result = json.loads((FOLDER / "evaluation.json").read_text())
    else:
        mllm = load("llava_smol", device="cpu", dtype=torch.float32)
        result = measure_evidence(mllm, options.num, options.seed)
    record = json.loads((PARTS / "training.json").read_text())
    FOLDER.mkdir(parents=True, exist_ok=True)
    write_json(FOLDER / "evaluation.json", result)
    figure = training_figure(record["log"])
    write_atomic(FOLDER / "training.png", lambda out: figure.savefig(out, format="png", metadata={"Software": None}))
    page = write_page(result, record)
    write_atomic(PAGE, lambda out: out.write(page.encode()))
    print(f"one- and two-hop image kinds: {_cell(result['accuracy']['known']['bar'])}; bar met: {result['bar']['met']}")


if __name__ == "__main__":
    main()
