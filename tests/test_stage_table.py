"""The stage table: rules by attention and by cause, and the command that joins two runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from intervals import intervals_of_zero_width
from scipy import stats
from test_exits import random_model

from analysis import knockout
from analysis.stage_table import make_stage_table
from analysis.statistics.bands import ImageBootstrap
from analysis.statistics.stage_table import (
    LEVEL,
    Losses,
    attention_stages,
    causal_stages,
    cuts_of_split,
    difference_limits,
    loss_limits,
    losses_of,
)
from analysis.statistics.stages import StageVerdict, stage_verdict
from dyvte.data.shapes import ShapesDataset
from dyvte.errors import ConfigError, DataError, RunFolderError
from dyvte.runs.config import compose

IMAGES, PER_IMAGE, LAYERS, SPLIT = 300, 2, 12, (2, 8)
NUMBER = IMAGES * PER_IMAGE
CLUSTERS = np.repeat(np.arange(IMAGES), PER_IMAGE)


def changed(rate: float, *shape: int, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).random((NUMBER, *shape)) < rate).astype(float)


def as_in_the_paper() -> Losses:
    """Every stage does what the paper says."""
    windows = np.concatenate([changed(0.7, 1), changed(0.05, LAYERS - 2, seed=1)], axis=1)
    return Losses(
        windows=windows,
        middle=changed(0.0),
        late=changed(0.15, seed=2),
        never=changed(0.8, seed=3),
        question=changed(0.2, seed=4),
        visual=changed(0.1, seed=5),
        swap=changed(0.5, seed=6),
    )


def verdicts(losses: Losses) -> list[str]:
    return [each.verdict for each in causal_stages(losses, SPLIT, CLUSTERS)]


def test_each_rule_decides_its_stage_alone() -> None:
    paper = as_in_the_paper()
    assert verdicts(paper) == ["confirmed"] * 3
    windows = paper.windows.copy()
    windows[:, 5] = windows[:, 0]  # another window is as harmful: nothing exceeds it
    assert verdicts(replace(paper, windows=windows)) == ["undetermined", "confirmed", "confirmed"]
    windows = np.zeros_like(windows)  # late entry loses nothing
    assert verdicts(replace(paper, windows=windows)) == ["refuted", "confirmed", "confirmed"]
    assert verdicts(replace(paper, middle=changed(0.1))) == ["confirmed", "refuted", "confirmed"]
    text_only = causal_stages(replace(paper, visual=changed(0.0)), SPLIT, CLUSTERS)[1]
    assert (text_only.verdict, text_only.note) == ("undetermined", "only q->q exceeds q->v")
    assert verdicts(replace(paper, late=changed(0.0))) == ["confirmed", "confirmed", "refuted"]
    assert verdicts(replace(paper, swap=paper.late)) == ["confirmed", "confirmed", "undetermined"]
    assert verdicts(replace(paper, late=changed(0.02))) == ["confirmed", "confirmed", "undetermined"]
    assert verdicts(replace(paper, never=changed(0.01))) == ["undetermined"] * 3


def test_few_images_decide_nothing_that_is_small() -> None:
    paper = as_in_the_paper()
    few = Losses(*(getattr(paper, name)[:10] for name in Losses.__dataclass_fields__))
    stage = causal_stages(few, SPLIT, CLUSTERS[:10])[1]
    assert stage.verdict == "undetermined"
    assert stage.numbers["q->v cut in the stage"][2] > 20


def test_questions_without_a_donor_are_left_out_of_the_swap() -> None:
    paper = as_in_the_paper()
    swap = paper.swap.copy()
    swap[::2] = np.nan
    numbers = causal_stages(replace(paper, swap=swap), SPLIT, CLUSTERS)[2].numbers
    assert numbers["q->v swapped in the stage"][0] == pytest.approx(100 * swap[1::2].mean())
    assert numbers["swap more than cut"][0] == pytest.approx(100 * (swap - paper.late)[1::2].mean())


@given(st.integers(2, 40), st.integers(0, 2**31 - 1))
def test_difference_limits_are_a_t_test_over_images(images: int, seed: int) -> None:
    """With one question an image; and copies of a question change nothing."""
    values = np.random.default_rng(seed).normal(size=images)
    mean, low, high = difference_limits(values, range(images))
    expected = stats.ttest_1samp(values, 0.0).confidence_interval(1 - 2 * (1 - LEVEL))
    assert (float(low), float(high)) == pytest.approx((expected.low, expected.high))
    twice = difference_limits(np.repeat(values, 2), np.repeat(np.arange(images), 2))
    assert [float(each) for each in twice] == pytest.approx([float(mean), float(low), float(high)])


@given(st.integers(2, 400), st.sampled_from([-100.0, 0.0, 37.5, 100.0]))
def test_a_difference_that_all_images_share_still_has_limits(images: int, points: float) -> None:
    """Those of a rate of 0: as many other images may have the least or the largest difference that there is."""
    mean, low, high = (float(each) for each in difference_limits(np.full(images, points), range(images)))
    reach = loss_limits(np.zeros(images), range(images))[2] / 100
    assert mean == points
    assert low == pytest.approx(points - reach * (100 + points))
    assert high == pytest.approx(points + reach * (100 - points))
    assert low < high


def test_limits_of_a_loss_cover() -> None:
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(300):
        of_image = rng.random(60) < 0.3
        answers = np.where(rng.random((60, 3)) < 0.8, of_image[:, None], rng.random((60, 3)) < 0.3).astype(float)
        inside += loss_limits(answers.ravel(), np.repeat(np.arange(60), 3))[1] <= 30
    assert inside / 300 >= LEVEL - 0.02


def test_attention_follows_the_sign_and_the_margin() -> None:
    def triple(low: float, high: float) -> list[float]:
        return [(low + high) / 2, low, high]

    base = {"split": [2, 8], "fall": triple(0.2, 0.4), "rise": triple(0.3, 0.5)}
    base |= {"visual_in": triple(0.2, 0.3), "visual_out": triple(0.15, 0.3)}
    assert [each.verdict for each in attention_stages(base)] == ["confirmed"] * 3
    other = base | {"fall": triple(-0.1, 0.05), "rise": triple(0.05, 0.3), "visual_out": triple(0.05, 0.3)}
    assert [each.verdict for each in attention_stages(other)] == ["refuted", "not_tested_by_attention", "undetermined"]
    unseen = base | {"visual_in": None, "visual_out": None}
    assert attention_stages(unseen)[1].verdict == "not_tested_by_attention"
    assert [each.verdict for each in attention_stages(None)] == ["undetermined"] * 3


def test_losses_are_read_by_their_keys() -> None:
    rng = np.random.default_rng(0)
    ids = [f"q{index}" for index in range(6)]
    rows = [
        {"id": name, "name": path if what == "cut" else f"{path} ({what})", "start": start, "stop": stop,
         "agree": bool(rng.random() < 0.5)}
        for path, what, (start, stop) in cuts_of_split(SPLIT, LAYERS)
        for name in ids
        if (what, name) != ("swap", "q2")
    ]  # fmt: skip
    table = pd.DataFrame(rows).sample(frac=1, random_state=0)
    losses = losses_of(table, SPLIT, LAYERS, ids[::-1])
    assert losses.windows.shape == (6, LAYERS - 1)
    cell = table.query("id == 'q4' and name == 'instruction->visual' and start == 3 and stop == 5")["agree"].item()
    assert losses.windows[1, 3] == 1 - cell
    assert np.isnan(losses.swap).tolist() == [name == "q2" for name in ids[::-1]]
    with pytest.raises(DataError, match=r"not cut instruction->visual in layers 0 to 2.*splits=\[\[3,8\]\]"):
        losses_of(table, (3, 8), LAYERS, ids)


def write_stages_run(folder: Path, verdict: StageVerdict, num_layers: int) -> Path:
    folder.mkdir(parents=True)
    summary = {"model": "random", "data": "shapes", "num_layers": num_layers, "num_samples": 60, "num_images": 60}
    (folder / "summary.json").write_text(json.dumps(summary | {"stages": verdict.to_dict()}))
    return folder


def test_the_command_joins_two_runs(tmp_path: Path) -> None:
    mllm, dataset = random_model(num_layers=8), ShapesDataset("test", 8)
    settings = ["device=cpu", "max_new_tokens=3", "bootstrap=20", "batch_size=4", "model.name=random"]
    few = ["paths=[[instruction,visual]]", "replace=[]", "control=false", "entry_exit=false"]
    cfg = compose("knockout", [f"output_dir={tmp_path}/knockout", "splits=[[2,5],[3,5]]", *few, *settings])
    knockout.run(cfg, mllm, dataset)
    cuts = pd.read_parquet(tmp_path / "knockout/stage_cuts.parquet")
    # the same cut, measured for the stage table and for the curves
    curves = pd.read_parquet(tmp_path / "knockout/knockouts.parquet")
    both = cuts.merge(curves, on=["id", "name", "start", "stop"])
    assert len(both) > 0
    assert (both["agree_x"] == both["agree_y"]).all()

    noise = np.random.default_rng(0).lognormal(0, 0.05, (2, 60, 8))
    cross = np.repeat([1.0, 0.3, 0.8], [3, 2, 3]) * noise[0]
    found = stage_verdict(cross, noise[1], ImageBootstrap(range(60), 50))
    stages = write_stages_run(tmp_path / "stages", found, 8)
    made = [f"stages={stages}", f"knockout={tmp_path}/knockout", f"output_dir={tmp_path}/table"]
    summary = make_stage_table(compose("stage_table", [*made, f"seed_runs=[{stages},{stages},{stages}]"]))
    table = pd.read_parquet(tmp_path / "table/stage_table.parquet")
    assert found.boundaries == [3, 5]
    assert table["split"].tolist() == ["(2, 5)"] * 3 + ["(3, 5)"] * 3
    assert table["by_attention"].tolist()[3:] == ["confirmed", "not_tested_by_attention", "confirmed"]
    assert table["by_attention"].isin(["confirmed", "refuted", "undetermined", "not_tested_by_attention"]).all()
    assert summary["recipe"]["num_runs"] == 3
    assert (tmp_path / "table/figures/stage_table.png").stat().st_size > 5000
    assert "by cause" in (tmp_path / "table/table.md").read_text()
    numbers = pd.read_csv(tmp_path / "table/numbers.csv")
    assert (numbers["low"] <= numbers["estimate"]).all()
    assert intervals_of_zero_width(tmp_path / "table") == []

    other = write_stages_run(tmp_path / "deeper", found, 9)
    with pytest.raises(ConfigError, match="num_layers is 9"):
        make_stage_table(compose("stage_table", [f"stages={other}", *made[1:]]))
    with pytest.raises(RunFolderError, match=r"nowhere has no summary\.json"):
        make_stage_table(compose("stage_table", ["stages=nowhere", *made[1:]]))


def test_splits_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    cfg = compose("knockout", [f"output_dir={tmp_path}", "splits=[[1,3]]", "device=cpu"])
    with pytest.raises(ConfigError, match=r"splits: \[1, 3\] does not cut 8 layers into three stages"):
        knockout.KnockoutMeasurement.of(random_model(num_layers=8), cfg)
