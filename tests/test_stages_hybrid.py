"""`python -m analysis.stages` on a hybrid model: gaps where layers do not attend, findings from those that do."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from quick_figures import printed
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

from analysis import stages
from dyvte.instrument.attention import MEASURES
from dyvte.runs.config import compose
from dyvte.testbed.model import TestbedSizes, build_model
from dyvte.testbed.tokenizer import build_processor

HYBRID = "caccacaca"
"""Layers of a hybrid decoder: convolutions (c) and attention (a)."""


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command's run of a random LLaVA around LFM2, whose convolutions do not attend."""
    folder = tmp_path_factory.mktemp("hybrid")
    sizes = TestbedSizes(layers=1, width=32, heads=2, mlp_width=32, vision_layers=1, vision_width=32, vision_heads=2)
    config = build_model(sizes, seed=0).config
    kinds = {"c": "conv", "a": "full_attention"}
    config.text_config = CONFIG_MAPPING["lfm2"](
        hidden_size=32,
        intermediate_size=32,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_hidden_layers=len(HYBRID),
        layer_types=[kinds[each] for each in HYBRID],
        vocab_size=config.text_config.vocab_size,
        pad_token_id=config.text_config.pad_token_id,
        bos_token_id=config.text_config.bos_token_id,
        eos_token_id=config.text_config.eos_token_id,
    )
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder / "model")
    build_processor(sizes.patch_size).save_pretrained(folder / "model")
    settings = ["data.limit=6", "data.kinds=[attribute,count]", "batch_size=3", "bootstrap=50", "maps.count=1"]
    chosen = ["model=hf", f"model.path={folder / 'model'}", f"output_dir={folder / 'run'}", *settings]
    with printed():
        stages.main(compose("stages", [*chosen, "heads=true", "contributions=true"]))
    return folder / "run"


def test_a_hybrid_model_has_gaps_where_layers_do_not_attend(hybrid: Path) -> None:
    """In curves, tables and the summary, and nowhere else; the stages are those of the layers that attend."""
    summary = json.loads((hybrid / "summary.json").read_text())
    silent = [layer for layer, kind in enumerate(HYBRID) if kind == "c"]
    assert summary["layers_without_attention"] == silent
    assert summary["num_layers"] == len(HYBRID)
    for curve in summary["curves"].values():
        assert [layer for layer, value in enumerate(curve) if value is None or value != value] == silent
    for found in (summary["stages"], summary["stages_by_mass"]):
        assert found["verdict"]
        assert all(HYBRID[layer] == "a" for layer in found["boundaries"] or [])
    curves = pd.read_parquet(hybrid / "curves.parquet")
    gaps = curves[curves["measure"].isin(MEASURES)].groupby("layer")["mean"].agg(lambda means: means.isna().all())
    assert gaps[gaps].index.tolist() == silent
    assert summary["figures"]
    for name in summary["figures"]:
        for suffix in ("png", "pdf"):
            assert (hybrid / "figures" / f"{name}.{suffix}").stat().st_size > 5000
