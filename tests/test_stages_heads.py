"""`analysis.stages` with contributions, heads and a map for every token of an answer."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from intervals import intervals_of_zero_width
from test_exits import random_model
from test_stages import LAYERS, model_folder, run

from analysis.measuring.attention import answer_maps, attention_map, choose_samples
from analysis.measuring.token_attention import TokenAttention
from analysis.statistics.attention.contributions import compare_looking_and_writing
from analysis.statistics.attention.heads import CARRIED, summarise_heads
from analysis.statistics.bands import ImageBootstrap
from analysis.statistics.stages import MIN_EFFECT
from dyvte.data.shapes import ShapesDataset
from dyvte.errors import ConfigError
from dyvte.instrument.attention import AttentionProbe
from dyvte.layout import INSTRUCTION, VISUAL

__all__ = ["model_folder"]


@pytest.fixture(scope="module")
def detailed(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = ["contributions=true", "heads=true", "maps.query=answer", "maps.max_new_tokens=1", "maps.count=1"]
    data = ["data.limit=4", "data.kinds=[attribute]"]
    return run(model_folder, tmp_path_factory.mktemp("runs") / "detailed", *options, data=data)


def test_summary_tables_and_figures(detailed: Path) -> None:
    summary = json.loads((detailed / "summary.json").read_text())
    layers, heads = (pd.read_parquet(detailed / f"{name}.parquet") for name in ("layers", "heads"))
    # heads of a question average to its row of the table, and the probe says what the image writes
    by_layer = heads.groupby(["id", "layer"])["mass"].mean()
    rows = layers.set_index(["id", "layer"])["cross_mass"]
    pd.testing.assert_series_equal(by_layer, rows.sort_index(), check_names=False, check_dtype=False, rtol=1e-5)
    share = layers.groupby("layer")["cross_contribution_share"].mean()
    found = summary["contributions"]
    np.testing.assert_allclose(found["bands"]["contribution_share"]["cross"]["mean"], share, rtol=1e-5)
    assert found["peak_writing"]["layer"] == int(share.idxmax())
    assert f"layer {int(share.idxmax())}" in found["in_words"]
    np.testing.assert_allclose(np.mean(summary["heads"]["mass"], axis=1), summary["bands"]["mass"]["cross"]["mean"])
    assert {"contributions", "heads"} <= set(summary["figures"])
    assert len(summary["maps"]) == len([name for name in summary["figures"] if "_token_" in name]) >= 1
    assert len(summary["heads"]["looking"]["mean"]) == LAYERS
    assert intervals_of_zero_width(detailed) == []


@torch.no_grad()
def test_contributions_are_the_probes() -> None:
    from analysis.measuring.attention import measure_attention

    mllm, dataset = random_model(), ShapesDataset("test", 4)
    samples = [sample for sample in dataset.readable() if sample.image is not None][:2]
    table = measure_attention(mllm, samples, contributions=True)["layers"]
    for sample in samples:
        batch = mllm.encode([sample.image], [sample.question])
        with AttentionProbe(mllm, contributions=True) as probe:
            mllm.model(**batch)
        for name in ("contribution_norm", "contribution_share"):
            of_sample = table[table["id"] == sample.id].sort_values("layer")
            measured = getattr(probe.stats, name)[0]
            np.testing.assert_allclose(of_sample[f"cross_{name}"], measured[:, INSTRUCTION, VISUAL], atol=1e-4)
            np.testing.assert_allclose(of_sample[f"visual_{name}"], measured[:, VISUAL, VISUAL], atol=1e-4)


def test_maps_of_answer_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first token's is that of the prompt's last token; sinks are marked, or their attention is left out."""
    mllm, dataset = random_model(), ShapesDataset("test", 8)
    (sample,) = choose_samples(dataset, 1, None)
    records, plain = [record for record, _ in answer_maps(mllm, sample, 3)], attention_map(mllm, sample, "last")
    assert records
    assert plain is not None
    assert [record["number"] for record in records] == list(range(len(records)))
    np.testing.assert_allclose(records[0]["maps"], plain[0]["maps"], atol=1e-5)
    np.testing.assert_allclose(records[0]["mass"], records[0]["heads"].mean(1), atol=1e-5)

    def with_a_sink(*args: object) -> TokenAttention:
        known = original(*args)  # type: ignore[arg-type]
        known.sinks[:, first] = True
        return known

    from analysis.measuring import attention as module

    original = module.token_attention
    batch = mllm.encode([sample.image], [sample.question])
    first = int(batch.layout.visual[0].nonzero()[0])
    monkeypatch.setattr(module, "token_attention", with_a_sink)
    marked, left_out = (answer_maps(mllm, sample, 3, how) for how in ("mark", "leave_out"))
    assert all(record["sinks"][:, 0, 0].all() for record, _ in marked)
    for (mark, _), (left, _) in zip(marked, left_out, strict=True):
        assert (mark["maps"][:, 0, 0] > 0).all()
        assert not left["maps"][:, 0, 0].any()
        np.testing.assert_allclose(left["mass"], mark["mass"] - mark["maps"][:, 0, 0], atol=1e-5)
    with pytest.raises(ConfigError, match="mark or leave_out"):
        answer_maps(mllm, sample, 3, "drop")


@settings(max_examples=15)
@given(st.integers(3, 6), st.integers(1, 5), st.integers(0, 99))
def test_head_numbers_equal_those_counted_one_by_one(layers: int, heads: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    mass, enrichment = rng.random((6, layers, heads)), rng.lognormal(0, 1, (6, layers, heads))
    found = summarise_heads(mass, enrichment, (1, 2), ImageBootstrap(range(6), 20))
    looks = enrichment.mean(0)
    assert found["looking"]["mean"] == pytest.approx([(row > 1).mean() for row in looks])
    for row, share in zip(mass.mean(0), found["carrying"]["mean"], strict=True):
        fewest = next(n for n in range(1, heads + 1) if np.sort(row)[::-1][:n].sum() >= CARRIED * row.sum() - 1e-9)
        assert share == pytest.approx(fewest / heads)
    for name, outer in (("fall", looks[:1]), ("rise", looks[2:])):
        pairs = [np.log(a) > np.log(b) + MIN_EFFECT for a, b in product(outer.ravel(), looks[1:2].ravel())]
        band = found["prevalence"][name]
        assert band["mean"] == pytest.approx(np.mean(pairs))
        assert 0 <= band["low"] <= band["high"] <= 1


def test_looking_and_writing() -> None:
    rng = np.random.default_rng(0)
    looking = np.array([0.1, 0.3, 0.6, 0.2]) + 0.01 * rng.normal(size=(20, 4))
    same = compare_looking_and_writing(looking, 2 * looking, ImageBootstrap(range(20), 50))
    assert same["rank_correlation"] == {"mean": 1.0, "low": 1.0, "high": 1.0}
    assert same["peak_looking"]["layer"] == same["peak_writing"]["layer"] == 2
    other = compare_looking_and_writing(looking, -looking, ImageBootstrap(range(20), 50))
    assert other["rank_correlation"]["mean"] == -1
    assert (other["peak_writing"]["low"], other["peak_writing"]["high"]) == (0, 0)
    with pytest.raises(ValueError, match="one shape"):
        compare_looking_and_writing(looking, looking[:, :2], ImageBootstrap(range(20)))
