"""`python -m analysis.stages`: right numbers, the same bytes after a kill, no findings where there is nothing."""

from __future__ import annotations

import json
import multiprocessing
import re
import shutil
import signal
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from intervals import intervals_of_zero_width
from omegaconf import OmegaConf
from PIL import Image
from planted import planted

from analysis import stages
from analysis.measuring.attention import file_name, measure_attention
from analysis.plots import attention as plots
from analysis.plots import style
from analysis.statistics.bands import Band, ImageBootstrap
from analysis.statistics.stages import stage_verdict
from dyvte.data import build_dataset
from dyvte.errors import ConfigError, DataError, ModelError, RunFolderError
from dyvte.instrument.attention import CURVES, MEASURES, AttentionProbe
from dyvte.instrument.views import view
from dyvte.runs.config import compose, load_model
from dyvte.testbed.model import TestbedSizes, build_model
from dyvte.testbed.tokenizer import build_processor
from tests.families import build, random_batch

LAYERS = 9
SHAPES = ["data.limit=11", "data.kinds=[attribute,count]"]
QUICK = ["batch_size=3", "bootstrap=50", "maps.count=2"]
SMALL = [*SHAPES, *QUICK]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LLaVA in Hub layout, with its processor."""
    folder = tmp_path_factory.mktemp("models") / "small"
    sizes = TestbedSizes(
        layers=LAYERS, width=32, heads=2, mlp_width=32, vision_layers=1, vision_width=32, vision_heads=2
    )
    build_model(sizes, seed=0).save_pretrained(folder)
    build_processor(sizes.patch_size).save_pretrained(folder)
    return folder


def run(model: Path, output: Path, *overrides: str, data: Sequence[str] = SHAPES) -> Path:
    folders = ["model=hf", f"model.path={model}", f"output_dir={output}"]
    stages.main(compose("stages", [*folders, *data, *QUICK, *overrides]))
    return output


@pytest.fixture(scope="module")
def finished(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(model_folder, tmp_path_factory.mktemp("runs") / "finished")


def tables(folder: Path) -> dict[str, bytes]:
    files = [*folder.glob("*.parquet"), *folder.glob("*.csv"), folder / "failures.jsonl", *folder.glob("figures/*.png")]
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(files)}


def without_times(folder: Path) -> dict:
    summary = json.loads((folder / "summary.json").read_text())
    del summary["seconds"]
    return summary


def test_summary_holds_what_others_read(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    assert {"model", "data", "num_samples", "num_failed", "num_layers", "seconds", "versions"} <= set(summary)
    assert (summary["model"], summary["data"]) == ("small", "shapes")
    assert (summary["num_samples"], summary["num_failed"], summary["num_layers"]) == (11, 0, LAYERS)
    assert set(summary["curves"]) == {"cross", "visual", "text"}
    assert all(len(curve) == LAYERS for curve in summary["curves"].values())
    for stages_of in (summary["stages"], summary["stages_by_mass"]):
        assert {"verdict", "boundaries", "boundaries_ci", "claims", "registered"} <= set(stages_of)
    assert OmegaConf.load(finished / "config.yaml").data.limit == 11
    for name in summary["figures"]:
        with Image.open(finished / "figures" / f"{name}.png") as image:
            assert len(image.convert("L").getcolors(1 << 16) or []) > 20  # not an empty panel


def test_summary_holds_every_number_of_the_curves(finished: Path) -> None:
    assert intervals_of_zero_width(finished) == []
    summary = json.loads((finished / "summary.json").read_text())
    curves = pd.read_parquet(finished / "curves.parquet")
    for (kind, measure, curve), rows in curves.groupby(["kind", "measure", "curve"]):
        if measure in MEASURES:
            of_kind = summary if kind == "all" else summary["kinds"][kind]
            found = of_kind["bands"][measure][curve]
        else:
            found = summary["entropy"][measure]
        for column in ("mean", "low", "high"):
            np.testing.assert_allclose(found[column], rows[column])
        assert (rows["low"] <= rows["mean"]).all()
        assert (rows["mean"] <= rows["high"]).all()


def test_table_equals_attention_maps_of_the_eager_model(finished: Path, model_folder: Path) -> None:
    """One sample at a time, from `output_attentions=True`, by the definitions."""
    cfg = compose("stages", ["model=hf", f"model.path={model_folder}", "model.attn_implementation=eager", *SMALL])
    mllm, dataset = load_model(cfg), build_dataset(cfg.data)
    table = pd.read_parquet(finished / "layers.parquet")
    assert table["id"].unique().tolist() == [sample.id for sample in dataset]
    for sample in [dataset[0], dataset[7]]:
        batch = mllm.encode([sample.image], [sample.question])
        with torch.no_grad():
            attentions = mllm.model(**batch, output_attentions=True).attentions
        visual, text = batch.layout.visual[0], batch.layout.text[0]
        question = batch.layout.text_status_positions[0]
        causal = torch.ones(len(visual), len(visual)).tril().bool()
        rows = table[table["id"] == sample.id]
        assert rows["kind"].unique().tolist() == [sample.kind]
        for layer, full in enumerate(attentions):
            no_sink = full[0].clone()
            no_sink[:, :, 0] = 0
            pairs_no_sink = causal.clone()
            pairs_no_sink[:, 0] = False
            for suffix, attention, pairs in (("", full[0], causal), ("_no_sink", no_sink, pairs_no_sink)):
                for curve, queries, keys in (
                    ("cross", question, visual), ("visual", visual, visual), ("text", question, text)
                ):  # fmt: skip
                    allowed = pairs[queries][:, keys].sum(-1)
                    sees = pairs[queries].sum(-1)
                    uniform = (allowed / sees)[sees > 0].mean()
                    row = rows[rows["layer"] == layer].iloc[0]
                    # A ratio of sums over queries and heads; with the sink each query of each head gives 1.
                    mass = float(attention[:, queries][:, :, keys].sum() / attention[:, queries].sum())
                    score = mass * int((sees > 0).sum()) / float(allowed.sum())
                    assert row[f"{curve}_mass{suffix}"] == pytest.approx(mass, abs=1e-5)
                    assert row[f"{curve}_mean_score{suffix}"] == pytest.approx(score, abs=1e-5)
                    assert row[f"{curve}_enrichment{suffix}"] == pytest.approx(mass / float(uniform), rel=1e-4)


def test_curves_are_means_over_samples(finished: Path) -> None:
    table = pd.read_csv(finished / "layers.csv")
    summary = json.loads((finished / "summary.json").read_text())
    for curve in CURVES:
        expected = table.groupby("layer")[f"{curve}_{stages.ENDPOINT}"].mean()
        np.testing.assert_allclose(summary["curves"][curve], expected, rtol=1e-6)
    counts = table[table["layer"] == 0].groupby("kind").size()
    assert {kind: found["num_samples"] for kind, found in summary["kinds"].items()} == counts.to_dict()


def test_maps_are_attention_of_the_last_prompt_token(finished: Path, model_folder: Path) -> None:
    cfg = compose("stages", ["model=hf", f"model.path={model_folder}", *SMALL])
    mllm, dataset = load_model(cfg), build_dataset(cfg.data)
    records = json.loads((finished / "summary.json").read_text())["maps"]
    assert len({record["kind"] for record in records}) == len(records) == 2
    for record in records:
        sample = next(each for each in dataset if each.id == record["id"])
        batch = mllm.encode([sample.image], [sample.question])
        with AttentionProbe(mllm, maps=True) as probe, torch.no_grad():
            mllm.model(**batch)
        assert probe.stats.maps is not None
        expected = probe.stats.maps[0, :, -1][:, batch.layout.visual[0]]
        found = np.array(record["maps"])
        assert found.shape == (LAYERS, 12, 12)
        np.testing.assert_allclose(found.reshape(LAYERS, -1), expected, atol=1e-5)
        np.testing.assert_allclose(record["mass"], expected.sum(1), atol=1e-5)
        place = view(mllm, batch)
        assert place is not None
        assert place.image is not None
        shown = np.asarray(sample.image.resize(place.image.shape[1::-1]), dtype=np.float32) / 255
        assert np.abs(shown - place.image).mean() < 0.05  # the picture under the map is the one that was asked about


class Crash(BaseException):
    """Stands for a kill."""


def test_interrupted_run_ends_with_the_same_bytes(
    finished: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    original = stages.measure_attention

    def interrupted(*args: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise Crash
        return original(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(stages, "measure_attention", interrupted)
    with pytest.raises(Crash):
        run(model_folder, tmp_path / "run")
    assert not (tmp_path / "run" / "layers.parquet").exists()
    run(model_folder, tmp_path / "run")
    assert calls == 5  # two batches before, two of four after
    assert tables(tmp_path / "run") == tables(finished)
    assert without_times(tmp_path / "run") == without_times(finished)


def test_killed_command_continues_from_any_folder(
    finished: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL after the first batch, then the same command again, where its own folder is named by the settings."""
    monkeypatch.chdir(tmp_path)
    settings = compose("stages", ["model=hf", f"model.path={model_folder}", *SMALL])
    folder = tmp_path / "outputs" / "stages" / "small" / "shapes"
    process = multiprocessing.get_context("fork").Process(target=stages.main, args=(settings,))
    process.start()
    deadline = time.monotonic() + 120
    while not list(folder.glob("shards/0*")) and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.002)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (folder / "summary.json").exists()
    stages.main(settings)
    assert tables(folder) == tables(finished)


def test_another_run_in_the_same_folder_is_refused(finished: Path, model_folder: Path, tmp_path: Path) -> None:
    before = tables(finished)
    for override, named in (("data.limit=12", r"data\.limit was 11, is 12"), ("batch_size=4", "batch_size was 3")):
        with pytest.raises(RunFolderError, match=named + r".*output_dir=FOLDER.*overwrite=true"):
            run(model_folder, finished, override)
    other = tmp_path / "small"
    build_model(TestbedSizes(layers=2, width=32, heads=2, vision_layers=1, vision_width=32), 1).save_pretrained(other)
    build_processor(8).save_pretrained(other)
    with pytest.raises(RunFolderError, match=r"model\.config was|model\.weights was"):
        run(other, finished)
    assert tables(finished) == before


def test_settings_of_the_figures_alone_do_not_need_another_run(
    finished: Path, model_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    before = (tmp_path / "run" / "layers.parquet").read_bytes()
    dataset = build_dataset(compose("stages", SMALL).data)
    chosen = [dataset[5].id, dataset[3].id]
    run(model_folder, tmp_path / "run", f"maps.ids=[{','.join(chosen)}]", "maps.query=instruction")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert {record["id"] for record in summary["maps"]} == set(chosen)
    assert {record["query"] for record in summary["maps"]} == {"instruction"}
    assert (tmp_path / "run" / "layers.parquet").read_bytes() == before
    with pytest.raises(ConfigError, match=r"maps\.ids: no usable sample 'nobody'"):
        run(model_folder, tmp_path / "run", "maps.ids=[nobody]")
    with pytest.raises(ConfigError, match=r"maps\.query=first"):
        run(model_folder, tmp_path / "run", "maps.query=first")


def write_questions(folder: Path, images: list[str | None]) -> Path:
    file = folder / "questions.jsonl"
    Image.new("RGB", (30, 20), "red").save(folder / "red.png")
    records = [
        {"question_id": index, "image": image, "text": "what color ?"}
        if image
        else {"question_id": index, "text": "hi"}
        for index, image in enumerate(images)
    ]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def own_data(folder: Path, images: list[str | None]) -> list[str]:
    return [
        "data=llava_json",
        "data.limit=null",
        f"data.file={write_questions(folder, images)}",
        f"data.image_folder={folder}",
    ]


def test_broken_samples_are_counted_and_named(model_folder: Path, tmp_path: Path) -> None:
    data = own_data(tmp_path, ["red.png", "gone.png", "red.png", None])
    folder = run(model_folder, tmp_path / "run", data=data)
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["num_samples"], summary["num_failed"]) == (3, 1)
    failure = json.loads((folder / "failures.jsonl").read_text())
    assert failure["where"].endswith("questions.jsonl line 2")
    table = pd.read_parquet(folder / "layers.parquet")
    assert table.groupby("id")["cross_mass"].count().to_dict() == {"0": LAYERS, "2": LAYERS, "3": 0}
    assert summary["stages"]["verdict"] == "undetermined"  # one image
    assert summary["kinds"] == {}  # these data have no kinds
    curves = pd.read_parquet(folder / "curves.parquet")
    assert not curves.duplicated(["kind", "measure", "curve", "layer"]).any()


def test_nothing_to_look_at_is_an_error(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    data = own_data(tmp_path / "broken", ["gone.png", "gone.png"])
    with pytest.raises(DataError, match=r"none of the 2 samples could be used; the first: .*questions\.jsonl line 1"):
        run(model_folder, tmp_path / "all_broken", data=data)
    assert len((tmp_path / "all_broken" / "failures.jsonl").read_text().splitlines()) == 2
    (tmp_path / "text").mkdir()
    data = own_data(tmp_path / "text", [None, None])
    with pytest.raises(ConfigError, match=r"no sample of the data .* has an image"):
        run(model_folder, tmp_path / "text_only", data=data)


def test_attention_that_is_not_a_number_is_an_error(model_folder: Path) -> None:
    cfg = compose("stages", ["model=hf", f"model.path={model_folder}", *SMALL])
    mllm, dataset = load_model(cfg), build_dataset(cfg.data)
    with torch.no_grad():
        mllm.layers[4].self_attn.q_proj.weight.fill_(torch.nan)
    with pytest.raises(ModelError, match=rf"{dataset[0].id}.* not a number in layer 4: torch.float32"):
        measure_attention(mllm, [dataset[0]])


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "internvl"])
def test_no_finding_on_random_weights(family: str) -> None:
    """Weights drawn so large that attention is far from uniform and layers differ strongly, and small ones."""
    for seed in range(6):
        mllm = build(family, seed, num_layers=12)
        if seed % 2:
            with torch.no_grad():
                for parameter in mllm.layers.parameters():
                    parameter.mul_(0.3)
        generator = torch.Generator().manual_seed(seed)
        curves: dict[str, list[torch.Tensor]] = {curve: [] for curve in CURVES}
        for _ in range(4):
            batch = random_batch(mllm, generator, num_images=[1] * 8)
            with AttentionProbe(mllm) as probe, torch.no_grad():
                mllm.model(**batch)
            for curve in CURVES:
                curves[curve].append(probe.stats.mean_curve(curve, stages.ENDPOINT))
        cross, visual = (torch.cat(curves[curve]).numpy() for curve in ("cross", "visual"))
        verdict = stage_verdict(cross, visual, ImageBootstrap(np.arange(len(cross)), 200))
        assert verdict.verdict != "three_stage", (family, seed)
        assert verdict.boundaries is None


def test_planted_layer_is_found() -> None:
    """Where text cannot see the image from layer m on, cross attention ends at m; one step is no three stages."""
    mllm = build("llava", num_layers=12)
    generator = torch.Generator().manual_seed(0)
    batches = [random_batch(mllm, generator, num_images=[1] * 8) for _ in range(3)]
    for exit_layer in (4, 7):
        curves: dict[str, list[torch.Tensor]] = {curve: [] for curve in CURVES}
        for batch in batches:
            with planted(mllm, exit_layer), AttentionProbe(mllm) as probe, torch.no_grad():
                mllm.model(**batch)
            for curve in CURVES:
                curves[curve].append(probe.stats.mean_curve(curve, stages.ENDPOINT))
        cross, visual = (torch.cat(curves[curve]).numpy() for curve in ("cross", "visual"))
        assert np.isnan(cross[:, exit_layer:]).all()  # nothing to see is no enrichment; the table says 0
        cross = np.nan_to_num(cross)
        outcome = stage_verdict(cross, visual, ImageBootstrap(np.arange(len(cross)), 100))
        assert outcome.verdict == "other"
        assert outcome.contrasts is not None
        assert exit_layer in outcome.contrasts.split


def test_views_cover_the_image() -> None:
    generator = torch.Generator().manual_seed(0)
    found = {}
    for family in ("llava", "llava_next", "qwen2_5_vl", "internvl"):
        mllm = build(family)
        batch = random_batch(mllm, generator, num_images=[1])
        found[family] = place = view(mllm, batch)
        if place is not None:
            assert place.rows * place.columns <= int(batch.layout.visual.sum())
    llava, llava_next, qwen = found["llava"], found["llava_next"], found["qwen2_5_vl"]
    assert llava is not None
    assert (llava.rows, llava.columns) == (4, 4)
    assert llava.image is not None
    assert llava.image.shape == (8, 8, 3)
    assert llava_next is not None
    assert (llava_next.rows, llava_next.columns) == (2, 2)  # the view of the whole image; the tiles are left out
    assert qwen is not None
    assert qwen.rows == 2
    mllm = build("llava")
    assert view(mllm, random_batch(mllm, generator, num_images=[2])) is None
    assert view(mllm, random_batch(mllm, generator, num_images=[0])) is None
    with pytest.raises(ValueError, match="batch of one sample, got 2"):
        view(mllm, random_batch(mllm, generator, num_images=[1, 1]))


def test_series_differ_without_colour() -> None:
    drawn = [*style.ATTENTION_SERIES.values(), style.ANSWER_SERIES]
    assert len({(series.linestyle, series.marker) for series in drawn}) == len(drawn)
    assert len({(series.linestyle, series.marker) for series in style.CYCLE}) == len(style.CYCLE)


@pytest.mark.parametrize("layers", [2, 12, 32])
def test_figures_of_any_depth(layers: int) -> None:
    rng = np.random.default_rng(0)

    def band(level: float) -> Band:
        mean = level * np.exp(0.1 * rng.normal(size=layers))
        return Band(mean, 0.9 * mean, 1.1 * mean)

    curves = {"cross": band(0.5), "visual": band(1.0), "text": band(3.0)}
    found = {"verdict": "three_stage", "boundaries": [layers // 3, layers // 2], "boundaries_ci": [[0, 1], [1, 2]]}
    bands = {"enrichment_no_sink": {name: curve.to_dict() for name, curve in curves.items()}}
    summary = {"model": "model", "data": "data", "num_layers": layers, "num_samples": 3, "num_images": 3}
    summary |= {"endpoint": "enrichment_no_sink", "bands": bands, "stages": found}
    figure = plots.draw_three_stages(summary)
    axis = figure.axes[0]
    assert [line.get_label() for line in axis.get_lines()[:3]] == [
        series.label for series in style.ATTENTION_SERIES.values()
    ]
    low, high = axis.get_ylim()
    assert low < min(curve.low.min() for curve in curves.values())
    assert high > max(curve.high.max() for curve in curves.values())
    record = {"maps": rng.random((layers, 4, 4)), "mass": [0.5] * layers, "query": "last"}
    record |= {"question": "what ?", "answer": "red", "reference": None}
    maps = plots.draw_attention_map(record, rng.random((24, 24, 3)))
    shown = [axis.get_title() for axis in maps.axes if axis.get_title()]
    assert shown == ["image", *(f"layer {layer}: 50%" for layer in range(layers))]
    plots.plt.close("all")


def test_ids_that_differ_give_files_that_differ() -> None:
    ids = ["train/000001", "val/000001", "a b", "a-b", "a/b", "x" * 300, "x" * 301, "日本", "中国", "\ud800", "plain-1"]
    names = [file_name(each) for each in ids]
    assert len(set(names)) == len(ids)
    assert names[-1] == "plain-1"
    assert all(re.fullmatch(r"[\w-]{1,64}", name, re.ASCII) for name in names)


def test_a_sample_without_an_answer_leaves_those_of_the_others(model_folder: Path) -> None:
    cfg = compose("stages", ["model=hf", f"model.path={model_folder}", *SMALL])
    mllm, dataset = load_model(cfg), build_dataset(cfg.data)
    samples = [dataset[0], replace(dataset[1], answer=None), dataset[2]]
    table = measure_attention(mllm, samples)["layers"]
    known = table.groupby("id")["answer_cross_mass"].apply(lambda values: bool(values.notna().all()))
    assert known.loc[[sample.id for sample in samples]].tolist() == [True, False, True]
    alone = measure_attention(mllm, [dataset[0]])["layers"]
    found = table[table["id"] == dataset[0].id]
    for column in ("cross_mass", "answer_cross_mass", "text_enrichment_no_sink"):
        np.testing.assert_allclose(found[column], alone[column], atol=1e-5)


def test_curves_do_not_depend_on_the_order_of_rows(finished: Path) -> None:
    table = pd.read_parquet(finished / "layers.parquet")
    by_sample = stages.LayerTable(table)
    shuffled = stages.LayerTable(table.sample(frac=1, random_state=0))
    rows = [by_sample.ids.tolist().index(each) for each in shuffled.ids]
    np.testing.assert_array_equal(shuffled.by_layer("cross_mass"), by_sample.by_layer("cross_mass")[rows])
