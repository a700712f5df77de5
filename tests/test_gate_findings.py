"""docs/gates.md, section 7: written from numbers of the weights and gates that ship, its verdicts from stated rules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from analysis import gate_findings
from analysis.gate_findings import FIRST, KEPT, ON_IMAGES, criteria, hops_verdict, section
from analysis.measuring.runs import shipped_files
from analysis.statistics.markdown import replace_section
from dyvte.errors import ConfigError
from dyvte.runs.config import compose
from dyvte.testbed.questions import IMAGE_KINDS

ROOT = Path(__file__).parents[1]
CFG = compose("gate_findings")
START, END = "<!-- gates -->", "<!-- /gates -->"
REPAIR = "out of date: python -m analysis.gate_findings"


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return json.loads((ROOT / CFG.findings).read_text())


def test_the_section_is_of_the_weights_and_gates_that_ship(found: dict[str, Any]) -> None:
    assert {name: found[name] for name in ("weights", "gates")} == shipped_files(), REPAIR


def test_the_section_is_of_the_questions_that_the_settings_name(found: dict[str, Any]) -> None:
    assert found["data"] == {key: CFG.data[key] for key in ("split", "seed", "limit")}, REPAIR
    assert sum(found["questions"].values()) == CFG.data.limit
    assert sum(found["questions"][kind] for kind in IMAGE_KINDS) == 2000
    assert len(set(found["questions"].values())) == 1, "kinds count equally only in equal numbers"


def test_the_page_holds_the_section(found: dict[str, Any]) -> None:
    page = (ROOT / CFG.page).read_text()
    assert page == gate_findings.with_section(page, found), REPAIR


@pytest.mark.parametrize(
    ("loss", "agreement", "ratio", "met"),
    [
        (0.01, 0.985, 0.8, [True, True, True]),
        (0.0101, 0.985, 0.8, [False, True, True]),
        (-0.002, 0.9849, 0.8, [True, False, True]),
        (0.0, 1.0, 0.801, [True, True, False]),
    ],
)
def test_criteria_are_met_up_to_their_limits(loss: float, agreement: float, ratio: float, met: list[bool]) -> None:
    checks = criteria({"accuracy_loss_ci": [-1.0, loss], "agreement": agreement, "cost_ratio": ratio})
    assert [each[-1] for each in checks] == met


def steps(*limits: tuple[float | None, float | None]) -> list[dict[str, Any]]:
    """Rows of one measure: no hop, one, and a step with these limits for each further hop."""
    first: list[tuple[float | None, float | None]] = [(None, None), (1.0, 2.0)]
    return [{"hops": hops, "step_low": low, "step_high": high} for hops, (low, high) in enumerate([*first, *limits])]


def test_hops_are_found_only_if_every_step_is() -> None:
    assert hops_verdict(steps((0.1, 0.5), (0.2, 0.9))) == "found"
    assert hops_verdict(steps((0.1, 0.5), (-0.2, 0.9))) == "not found"
    assert hops_verdict(steps((0.1, 0.5), (-0.9, -0.2))) == "not found"
    assert hops_verdict(steps((-0.5, -0.1), (-0.9, -0.2))) == "opposite found"
    assert hops_verdict(steps()) == "not found"  # arithmetic against the rest says nothing about hops


def test_a_page_without_its_comments_is_refused() -> None:
    assert replace_section(f"a {START} b {END} c", "gates", "new") == f"a {START}\nnew\n{END} c"
    for text in ("", START, END, f"{END} {START}"):
        with pytest.raises(ConfigError, match="the page to write on"):
            replace_section(text, "gates", "new")


def test_other_gates_are_refused() -> None:
    for setting in ("policy.gates=elsewhere", "model.name=other"):
        with pytest.raises(ConfigError, match="gates that ship"):
            gate_findings.main(compose("gate_findings", [setting]))


def test_a_small_run_end_to_end(tmp_path: Path) -> None:
    page = tmp_path / "gates.md"
    page.write_text(f"before\n{START}\nold\n{END}\nafter\n")

    def run(limit: int) -> dict[str, Any]:
        settings = {
            "data.limit": limit,
            "max_new_tokens": 3,
            "comparison_dir": tmp_path / "runs",
            "reference_dir": tmp_path / "reference",
            "page": page,
            "findings": tmp_path / "findings.json",
            "training": tmp_path / "nowhere",
        }
        gate_findings.main(compose("gate_findings", [f"{key}={value}" for key, value in settings.items()]))
        return json.loads((tmp_path / "findings.json").read_text())

    found = run(9)
    assert page.read_text() == f"before\n{START}\n\n{section(found)}\n\n{END}\nafter\n"
    assert "its time is not stated" in page.read_text()
    answers = pd.read_parquet(tmp_path / "runs" / "dynamic_exit" / "samples.parquet")
    on_images = answers[answers["kind"] != "arithmetic"]
    rows = {row["name"]: row for row in found["rows"]}
    assert found["questions"]["arithmetic"] == len(answers) - len(on_images) == 1
    own = rows[ON_IMAGES]
    assert own["agreement"] == pytest.approx((on_images["answer"] == on_images["full_answer"]).mean())
    assert own["accuracy"] == pytest.approx(on_images["correct"].mean())
    assert own["mean_exit_layer"] == pytest.approx(on_images["exit_layer"].mean())
    assert rows["the gates' exits, permuted"]["cost"] == pytest.approx(own["cost"], rel=0.05)
    for name in (FIRST, KEPT):
        assert rows[name]["agreement"] == 1.0
        assert rows[name]["accuracy_loss"] == 0.0
    assert rows[FIRST]["cost"] <= rows[KEPT]["cost"] <= 1.0
    assert set(gate_findings.CONTROLS.values()) < set(rows)

    shards = {file: file.stat().st_mtime_ns for file in (tmp_path / "runs").rglob("shard.json")}
    text = page.read_text()
    assert run(9) == found  # nothing left to ask
    assert shards == {file: file.stat().st_mtime_ns for file in (tmp_path / "runs").rglob("shard.json")}
    assert page.read_text() == text
    assert sum(run(6)["questions"].values()) == 6  # another run in its folder is replaced
