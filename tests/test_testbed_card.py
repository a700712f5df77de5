"""The testbed's evidence: probes, accuracy tables, training logs, and the card that is made of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from analysis.statistics.bands import ImageBootstrap
from analysis.statistics.stages import stage_verdict
from docs.tooling.testbed_card import (
    accuracy_markdown,
    documents,
    statements_markdown,
    verdicts_markdown,
)
from docs.tooling.testbed_probes import linear_probe, probe_report
from docs.tooling.testbed_runs import accuracy_table, read_log
from dyvte.mllm import MLLM
from dyvte.testbed.questions import IMAGE_KINDS, KINDS, ShapesQuestions


def test_a_linear_probe_finds_what_is_there_and_nothing_else() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1200, 16, generator=generator)
    there = (features[:, :3] * torch.tensor([1.0, 2.0, -1.0])).argmax(-1)
    absent = torch.randint(0, 3, (1200,), generator=generator)
    for labels, low, high in ((there, 0.93, 1.0), (absent, 0.2, 0.45)):
        predicted = linear_probe(features[:900], labels[:900], features[900:], 3)
        assert low <= (predicted == labels[900:]).float().mean() <= high


def test_accuracy_counts_each_kind_and_leaves_arithmetic_out_of_the_image_kinds() -> None:
    records = list(ShapesQuestions("test", 90))
    answers = [r.answer if r.kind in ("count", "arithmetic") else "nothing" for r in records]
    table = accuracy_table(records, answers)
    assert table["count"]["accuracy"] == 1.0
    assert table["relation"]["accuracy"] == 0.0
    assert table["image"]["num"] == sum(r.kind in IMAGE_KINDS for r in records)
    assert table["image"]["accuracy"] == pytest.approx(1 / len(IMAGE_KINDS), abs=0.01)
    assert table["image"]["low"] < table["image"]["accuracy"] < table["image"]["high"]


def test_a_resumed_log_keeps_the_last_word_of_a_step(tmp_path: Path) -> None:
    lines = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 2, "loss": 1.5}, {"step": 3, "loss": 1.0}]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    assert [x["loss"] for x in read_log(tmp_path / "log.jsonl")] == [3.0, 1.5, 1.0]


def _result(accuracy: float) -> dict:
    entry = {"accuracy": accuracy, "low": accuracy - 0.01, "high": accuracy + 0.01, "num": 250}
    table = {k: dict(entry) for k in [*KINDS, "image"]}
    return {
        "accuracy": {"image": table, "blank": table, "other": table},
        "matched": table,
        "probes": {"its own color": {**entry, "majority": 0.2}},
        "majority": dict.fromkeys([*KINDS, "image"], 0.4),
        "said_to_blank": {"answer": "0", "share": 0.55},
        "seconds": 12.0,
        "bar": {"met": accuracy >= 0.9, "kinds_below": {} if accuracy >= 0.8 else {"count": accuracy}},
    }


@pytest.mark.parametrize(("accuracy", "met"), [(0.95, True), (0.7, False)])
def test_card_and_page_hold_the_numbers_and_whether_the_bar_is_met(accuracy: float, met: bool) -> None:
    result = _result(accuracy)
    for text in documents(result, {}, 4_400_000):
        assert accuracy_markdown(result, None) in text
        assert ("does **not** meet" not in text) == met


def _run(cross: list[float], agreement: list[float], depths: list[float], neighbor: float = 0.3) -> dict:
    def band(values: list[float]) -> dict:
        mean, wide = np.array(values), 0.05
        return {"mean": mean.tolist(), "low": (mean - wide).tolist(), "high": (mean + wide).tolist()}

    kinds = ("attribute", "same_attribute", "neighbor", "two_hop")
    of_kind = {k: {name: v[0] for name, v in band([d]).items()} for k, d in zip(kinds, depths, strict=True)}
    attention = {"instruct": {"enrichment_no_sink": {"cross": band(cross)}}}
    accuracy = {"image": {"accuracy": 0.9, "low": 0.85, "high": 0.95}}
    probes = {
        f"{name} color": {"accuracy": value, "low": value - 0.02, "high": value + 0.02, "majority": 0.25}
        for name, value in (("its own", 0.97), ("its only neighbour's", neighbor))
    }
    return {
        "accuracy": accuracy,
        "probes": probes,
        "attention": attention,
        "exits": {"agreement": band(agreement), "exit_depth": of_kind},
    }


def test_a_statement_holds_in_a_run_only_where_its_intervals_say_so() -> None:
    curve, agreement, depths = [0.6, 0.3, 0.4, 0.8, 0.9], [0.4, 0.7, 0.96, 0.98, 1.0], [1.0, 2.0, 2.5, 3.0]
    runs = {
        "yes": _run(curve, agreement, depths),
        "no rise": _run([0.6, 0.5, 0.4, 0.3, 0.34], agreement, depths),
        "late": _run(curve, [0.4, 0.7, 0.96, 0.94, 1.0], depths),
        "one deeper kind": _run(curve, agreement, [1.0, 1.05, 2.5, 3.0]),
        "tokens that know": _run(curve, agreement, depths, neighbor=0.4),
        "blind": {},
    }
    header, _, right, *rows = (line.strip("| ").split(" | ") for line in statements_markdown(runs).splitlines())
    assert right[1:] == ["0.900 [0.850, 0.950]"] * 5
    assert header == ["statement", "yes", "no rise", "late", "one deeper kind", "tokens that know"]
    assert [[cell.split(" (")[0] for cell in row[1:]] for row in rows] == [
        ["yes", "yes", "yes", "yes", "**no**"],
        ["yes", "**no**", "yes", "yes", "yes"],
        ["yes", "yes", "**no**", "yes", "yes"],
        ["yes", "yes", "yes", "**no**", "yes"],
    ]
    assert "own 0.97; neighbour's 0.30, majority 0.25" in rows[0][1]
    assert "0.60, lowest 0.30 in layer 1, 0.90 in the last" in rows[1][1]
    assert "from k = 2 of 4" in rows[2][1]
    assert "from k = 4 of 4" in rows[2][3]


def test_verdicts_of_the_training_stages_say_what_they_rest_on() -> None:
    rng = np.random.default_rng(0)
    level = np.repeat([1.0, 0.2, 1.0], 5)
    cross = level * rng.lognormal(0, 0.1, (60, 15))
    found = stage_verdict(cross, 2.0 - level + np.zeros_like(cross), ImageBootstrap(np.arange(60)))
    few = stage_verdict(cross[:, :3], cross[:, :3], ImageBootstrap(np.arange(60)))
    runs = {
        "main": {"attention": {"language": {"stages": few.to_dict()}, "instruct": {"stages": found.to_dict()}}},
        "blind": {"attention": {}},
        "of earlier rules": {"attention": {"instruct": {"stages": {"verdict": "other", "checks": {}}}}},
    }
    head, _, *rows = verdicts_markdown(runs).splitlines()
    assert head.count("|") == 5
    (row,) = (line.strip("| ").split(" | ") for line in rows)
    assert row[:3] == ["main", "undetermined", "-"]
    assert row[3].startswith("three stage: middle stage layers 5 to 9, fall +1.6")
    assert row[3].endswith("; valley found, shape found, visual peak found")


def test_probes_read_attributes_off_the_shipped_model(shapes: MLLM) -> None:
    report = probe_report(shapes, num_scenes=240, batch_size=24, seed=0)
    assert report["its own color"]["low"] > 0.9
    assert report["its only neighbour's color"]["high"] < 0.6
    assert report["its own color"]["num"] > report["its only neighbour's color"]["num"] > 10
