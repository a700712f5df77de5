"""The rules of `docs/hypotheses_smol.md`, on runs with a planted answer."""

import numpy as np
import pandas as pd
import pytest

from docs.tooling import smol_findings as findings


def stage_table(curve: np.ndarray, images: int = 40, noise: float = 0.05) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    rows = []
    for image in range(images):
        for question in range(3):
            values = curve * np.exp(noise * rng.normal(size=len(curve)))
            rows.append(
                pd.DataFrame(
                    {
                        "id": f"{image}-{question}",
                        "image_id": f"i{image}",
                        "layer": range(len(curve)),
                        "cross_enrichment_no_sink": values,
                    }
                )
            )
    return pd.concat(rows)


@pytest.mark.parametrize(
    ("first", "last", "verdict"),
    [(1.6, 1.8, "confirmed"), (1.6, 0.7, "refuted"), (1.0, 1.0, "refuted"), (1.5, 1.1, "undetermined")],
)
def test_a_valley_is_confirmed_only_where_both_sides_lie_clearly_above_it(first, last, verdict):
    curve = np.ones(30)
    curve[:5], curve[20:] = first, last
    outcome = findings.valley(stage_table(curve, noise=0.5 if verdict == "undetermined" else 0.05))
    assert outcome.verdict.startswith(verdict)


def outcome(verdict: str) -> findings.Outcome:
    return findings.Outcome(verdict, "numbers")


@pytest.mark.parametrize(
    ("main", "seeds", "verdict"),
    [
        ("refuted", ["confirmed", "confirmed"], "refuted"),
        ("confirmed", ["confirmed", "confirmed"], "confirmed"),
        ("confirmed", ["confirmed", "refuted"], "undetermined"),
        ("confirmed", ["confirmed"], "confirmed in the main run; the seeds are missing"),
    ],
)
def test_a_valley_in_every_seed_needs_every_seed(main, seeds, verdict):
    found = findings.valley_in_all(outcome(main), {f"seed{i}": outcome(each) for i, each in enumerate(seeds)})
    assert found.verdict == verdict
    assert all(f"seed{i}: {each}" in found.numbers for i, each in enumerate(seeds))


@pytest.mark.parametrize(
    ("main", "control", "verdict"),
    [
        ("confirmed", "refuted", "confirmed"),
        ("confirmed", "confirmed", "refuted"),
        ("confirmed", "undetermined", "undetermined"),
        ("refuted", "refuted", "confirmed by the letter, but the main run has no valley either"),
    ],
)
def test_a_control_without_a_valley_says_nothing_where_the_main_run_has_none(main, control, verdict):
    found = findings.valley_is_absent(outcome(main), outcome(control), 0.41)
    assert found.verdict == verdict
    assert "answers 41%" in found.numbers


@pytest.mark.parametrize(("slope", "verdict"), [(1.0, "confirmed"), (-1.0, "refuted"), (0.0, "undetermined")])
def test_depth_by_hops_reads_the_paired_slope(slope, verdict):
    rng = np.random.default_rng(1)
    kinds = ["attribute", "neighbor", "two_hop", "three_hop"]
    rows = [
        {"part": "questions", "image_id": f"i{i}", "kind": kind, "exit_depth": 8 + slope * n + rng.normal() + offset}
        for i, offset in enumerate(rng.normal(scale=6, size=60))
        for n, kind in enumerate(kinds)
    ]
    outcome = findings.depth_by_hops(pd.DataFrame(rows))
    assert outcome.verdict == verdict
    assert "60 images" in outcome.numbers


@pytest.mark.parametrize(("shift", "verdict"), [(-3.0, "confirmed"), (3.0, "refuted"), (0.0, "undetermined")])
def test_recall_order_has_a_sign(shift, verdict):
    rng = np.random.default_rng(2)
    rows = [
        {"image_id": f"i{i}", "kind": kind, "exit_depth": 10 + rng.normal() + (shift if kind == "look_recall" else 0)}
        for i in range(60)
        for kind in ("look_recall", "recall_look", "count")
    ]
    assert findings.recall_order(pd.DataFrame(rows)).verdict == verdict


def test_without_runs_nothing_is_decided_and_a_weak_model_decides_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert {o.verdict for o in findings.decide().values()} == {"not decided"}
    folder = tmp_path / "docs" / "testbed_smol"
    folder.mkdir(parents=True)
    (folder / "evaluation.json").write_text('{"accuracy": {"known": {"bar": {"accuracy": 0.9}}}}')
    assert {o.verdict for o in findings.decide().values()} == {"not yet tested"}


def cut_table(losses: dict[tuple[int, int], float], name: str, images: int = 150) -> pd.DataFrame:
    rng = np.random.default_rng(3)
    return pd.DataFrame(
        [
            {"id": f"q{i}", "image_id": f"i{i}", "kind": "count", "name": name, "start": start, "stop": stop}
            | {"loss": 100.0 * (rng.random() < loss)}
            for i in range(images)
            for (start, stop), loss in losses.items()
        ]
    )


@pytest.mark.parametrize(
    ("within", "outside", "verdict"), [(0.6, 0.2, "confirmed"), (0.2, 0.6, "refuted"), (0.4, 0.4, "undetermined")]
)
def test_the_middle_has_to_lead_by_its_interval(within, outside, verdict):
    losses = {(start, start + 5): within if 5 <= start <= 15 else outside for start in range(0, 26, 5)}
    assert findings.middle_of_the_image(cut_table(losses, "visual->visual")).verdict == verdict


@pytest.mark.parametrize(("loss", "verdict"), [(0.3, "confirmed"), (0.0, "undetermined"), (0.03, "undetermined")])
def test_late_use_needs_its_lower_limit(loss, verdict):
    assert findings.late_use(cut_table({(20, 30): loss}, "instruction->visual")).verdict == verdict


def test_late_use_is_refuted_by_many_that_lose_nothing():
    assert findings.late_use(cut_table({(20, 30): 0.0}, "instruction->visual", images=600)).verdict == "refuted"


@pytest.mark.parametrize(("look", "recall", "verdict"), [(0.7, 0.1, "confirmed"), (0.1, 0.7, "refuted")])
def test_late_entry_has_a_sign(look, recall, verdict):
    tables = [
        cut_table({(0, 5): loss}, "instruction->visual").assign(kind=kind)
        for kind, loss in (("look_recall", look), ("recall_look", recall))
    ]
    assert findings.late_entry(pd.concat(tables)).verdict == verdict


@pytest.mark.parametrize(
    ("low", "high", "verdict"), [(-0.3, -0.1, "confirmed"), (0.1, 0.2, "refuted"), (-0.1, 0.1, "undetermined")]
)
def test_a_withheld_status_is_read_by_its_interval_and_what_gates_were_trained_on_is_said(low, high, verdict):
    tests = {"withheld": {"value": (low + high) / 2, "low": low, "high": high}, "trained_on": ["withheld"]}
    outcome = findings.status_withheld({"tests": {"llava_smol": tests}, "images": 12})
    assert outcome.verdict == verdict
    assert "12 images; the gates were trained on such statuses (withheld)" in outcome.numbers
