"""The report says what the summaries say, loads nothing, and can be read by everyone."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import browser
import numpy as np
import pandas as pd
import pytest
import yaml
from omegaconf import DictConfig, OmegaConf

from analysis.measuring.attention import attention_map
from analysis.measuring.lens import patch_words
from analysis.plots.attention import relative_maps
from analysis.report import build as report_module
from analysis.report.build import write_report
from analysis.report.cells import interval_text, written
from analysis.report.runs import OVERRIDES, REPORT_STEPS, FinishedRun, find_runs, lookup, pointer
from analysis.report.samples import Samples, gates_for, look_at_samples
from analysis.report.tables import tables_of
from dyvte.data import build_dataset
from dyvte.errors import ConfigError, ModelError, RunFolderError
from dyvte.loading import load
from dyvte.policies.exits.dynamic_exit import DynamicExit
from dyvte.runs.config import compose

LAYERS = 6
KINDS = ("attribute", "two_hop")
HOSTILE = '</script><img src=x onerror=alert(1)> "it\'s" & <b>'
PNG = (
    b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x00\x00\x00\x01\x00\x00\x00\x01\x08\x00\x00\x00\x00:~\x9bU"
    b"\x00\x00\x00\nIDATx\x9cc\xf8\x0f\x00\x01\x01\x01\x00\x1b\xb6\xeeV\x00\x00\x00\x00IEND\xaeB`\x82"
)


# ---------------------------------------------------------------- run folders as the commands leave them
def band(rng: np.random.Generator, *shape: int) -> dict[str, Any]:
    mean = rng.random(shape)
    return {"mean": mean.tolist(), "low": (mean - 0.1).tolist(), "high": (mean + 0.1).tolist()}


def stages_summary(rng: np.random.Generator) -> dict[str, Any]:
    measures = [name + tail for name in ("mass", "mean_score", "enrichment") for tail in ("", "_no_sink")]
    bands = {name: {curve: band(rng, LAYERS) for curve in ("cross", "visual", "text")} for name in measures}
    endpoint = bands["enrichment_no_sink"]
    stages = {"verdict": "other", "reasons": ["no fall"], "boundaries": None, "boundaries_ci": None}
    contrasts = {"fall": [-0.2, -0.3, -0.1], "rise": [0.1, 0.05, 0.2], "visual_in": None, "visual_out": None}
    stages |= {"contrasts": contrasts, "claims": {"valley": "not_found", "shape": "undetermined"}}
    kind = {"num_samples": 4, "num_images": 2, "bands": {"enrichment_no_sink": endpoint}, "stages": stages}
    return {
        "endpoint": "enrichment_no_sink",
        "num_images": 3,
        "curves": {name: each["mean"] for name, each in endpoint.items()},
        "bands": bands,
        "entropy": {"text_entropy": band(rng, LAYERS)},
        "stages": stages,
        "kinds": dict.fromkeys(KINDS, kind),
        "maps": [],
    }


def exits_summary(rng: np.random.Generator) -> dict[str, Any]:
    def group() -> dict[str, Any]:
        curves = {name: band(rng, LAYERS + 1) for name in ("accuracy", "agreement", "kl", "kl_reverse")}
        depth = {**{key: float(value) for key, value in band(rng).items()}, "counts": [1] * (LAYERS + 1)}
        stops = {"verdict": "undetermined"}
        means = {name: each["mean"] for name, each in curves.items()}
        return {"num_samples": 8, "num_images": 3, "bands": curves, "exit_depth": depth, "stops": stops, **means}

    overall = group()
    stops = {
        "statement": "visual tokens contribute to the answers, and no longer do from some layer on",
        "verdict": "found",
        "reasons": ["upper limit of the loss small"],
        "exit_layer": 3,
        "estimates": {"gain": [0.4, 0.3, 0.5], "accuracy_settles": [3, 2, 4]},
        "details": {},
    }
    depends = {**stops, "statement": "the depth depends", "verdict": "not_found", "exit_layer": None}
    depends["estimates"] = {"p_value": 0.25, "mean_depth": {"attribute": 1.0}}
    matrix = {"mean": rng.random((LAYERS + 1, LAYERS)).tolist()}
    return {
        **{name: overall[name] for name in ("accuracy", "agreement", "kl")},
        "num_questions": 8,
        "num_images": 3,
        "flops_decoder": [1e9 * (k + 1) for k in range(LAYERS + 1)],
        "flops_total": [2e9 * (k + 1) for k in range(LAYERS + 1)],
        "k_star": {"0.003": 4, "0.0001": None},
        "k_star_details": [
            {"eta": 0.003, "layer": 4, "interval": [3, 5], "stays": 4},
            {"eta": 0.0001, "layer": None, "interval": [5, None], "stays": None},
        ],
        "findings": {"contribution_stops": stops, "exit_depth_depends_on_kind": depends},
        "overall": overall,
        "kinds": {kind: group() for kind in KINDS},
        "entropy": {"text_entropy": {"matrix": matrix, "difference": matrix}},
        "tokens": {},
    }


def policy_summary(policy: str, exits: list[int]) -> dict[str, Any]:
    numbers = {"num_questions": 8, "accuracy": 0.6, "accuracy_ci": [0.5, 0.7], "accuracy_loss": 0.02}
    numbers |= {"accuracy_loss_ci": [-0.01, 0.05], "agreement": 0.9, "agreement_ci": [0.8, 1.0]}
    numbers |= {"mean_exit_layer": 4.25, "cost": 0.7, "cost_of_fixed_exits": 0.8, "exit_layers": exits}
    oracle = {"flops_decoder": 1e9, "accuracy": 0.6, "agreement": 1.0}
    kinds = {kind: dict(numbers) for kind in KINDS}
    return {"policy": policy, **numbers, "oracle": oracle, "prefill_ms": 12.5, "kinds": kinds, "num_samples": 8}


def knockout_summary(rng: np.random.Generator) -> dict[str, Any]:
    windows = [[0, 3], [1, 4], [3, 6]]
    effect = {name: band(rng, len(windows)) for name in ("agreement_points", "nats", "first_token_percent")}
    effect["agreement_points"]["mean"] = [-2.0, -40.5, -1.0]
    return {
        "num_questions": 8,
        "num_images": 3,
        "windows": windows,
        "overall": {"effects": {"instruction->visual": effect}},
    }


def stage_table_summary() -> dict[str, Any]:
    row = {"split": "(2, 4)", "stage": "1 fusion", "first_layer": 0, "last_layer": 1, "note": ""}
    row |= {
        "by_attention": "confirmed",
        "attention_numbers": "fall 0.28",
        "by_cause": "refuted",
        "cause_numbers": "cut 3",
    }
    return {"rows": [row, row | {"split": "(3, 5)", "by_cause": "undetermined"}], "cause": {"num_images": 3}}


def lens_summary(rng: np.random.Generator) -> dict[str, Any]:
    patches = {"shape": {"share": band(rng, LAYERS + 1), "control": band(rng, LAYERS + 1)}}
    return {"num_questions": 8, "answer": {"logit": {"is_answer": band(rng, LAYERS + 1)}}, "patches": patches}


def tables_summary() -> dict[str, Any]:
    def row(method: str, budget: float | None) -> dict[str, Any]:
        limits = {f"{name}_{end}": 0.5 for name in ("accuracy", "accuracy_needs_image") for end in ("low", "high")}
        shown = {"accuracy": 0.5, "accuracy_needs_image": 0.4, "agreement": 0.9, "mean_exit_layer": 3.0}
        return {"method": method, "budget": budget, "cost": 0.5, **shown, **limits, "setting": "layer=2"}

    verdict = {"on": "accuracy", "budget": 0.5, "ahead": "fastv", "not_told_apart": ["vtw"]}
    lead = {"lead": {"vtw": [0.02, -0.01, 0.05], "tome": [0.1, 0.05, 0.15]}}
    rows = [row("none", None), row("fastv", 0.5), row("vtw", 0.5), row("tome", 0.5)]
    return {"experiment": "matched", "rows": rows, "verdicts": [verdict | lead]}


def cost_summary() -> dict[str, Any]:
    row = {f"{name}_{unit}": 1.5 for name in ("prefill", "decode") for unit in ("ms", "ratio")}
    row |= {f"{key}_{end}": value for key, value in list(row.items()) for end in ("q25", "q75")}
    row |= {"tokens_per_second": 80.0, "flops_decoder": 1e9, "kv_cache_bytes": 1e6, "setting": ""}
    rows = [{"batch_size": 1, "method": name, **row} for name in ("none", "fixed_exit")]
    return {"device": "cpu", "threads": 1, "rows": rows}


def train_summary() -> dict[str, Any]:
    numbers = {"agreement": 0.97, "disagreement_upper_limit": 0.05, "mean_exit_layer": 3.5, "cost": 0.6}
    numbers |= {"cost_of_fixed_exits": 0.7, "cost_of_oracle": 0.3, "validation_questions": 12}
    return {"recipe": "default", **numbers, "fixed_exit": 4, "fixed_exit_by_kind": {"attribute": 2}}


def write_run(
    path: Path,
    model: str,
    summary: dict[str, Any],
    cfg: DictConfig,
    figures: tuple[str, ...] = (),
    overrides: list[str] | None = None,
) -> None:
    """A run folder with this summary."""
    (path / "figures").mkdir(parents=True)
    common = {"model": model, "data": "shapes", "num_samples": 8, "num_failed": 0, "num_layers": LAYERS}
    common |= {"seconds": 1.5, "versions": {"python": "3.11.0", "dyvte": "0.1.0"}}
    (path / "summary.json").write_text(json.dumps(common | summary))
    (path / "config.yaml").write_text(OmegaConf.to_yaml(cfg, resolve=True))
    if overrides is not None:
        (path / OVERRIDES).write_text(yaml.safe_dump(overrides))
    made_of = {"model": {"weights": f"weights of {model}"}, "data": {"content": "questions"}}
    (path / "fingerprint.json").write_text(json.dumps(made_of))
    for name in figures:
        (path / "figures" / f"{name}.png").write_bytes(PNG)


def write_runs(root: Path, model: str = "llava_shapes", seed: int = 0) -> Path:
    """Every run folder of a model."""
    rng = np.random.default_rng(seed)
    place = f"{model}/shapes"
    figures = ("kinds", "measures", "stages", "map_test-1", "of_my_own")
    write_run(
        root / "stages" / place,
        model,
        stages_summary(rng),
        compose("stages", ["data.limit=8"]),
        figures,
        ["data.limit=8"],
    )
    figures = ("entropy", "exit_depth", "exits", "kinds", "kl")
    write_run(root / "exits" / place, model, exits_summary(rng), compose("exits", ["data.limit=8"]), figures)
    figures = ("knockout", "entry_exit")
    write_run(root / "knockout" / place, model, knockout_summary(rng), compose("knockout"), figures)
    write_run(root / "stage_table" / place, model, stage_table_summary(), compose("stage_table"), ("stage_table",))
    write_run(root / "lens" / place, model, lens_summary(rng), compose("lens"), ("answer", "grid_test-1"))
    train = root / "train" / model / "shapes_train"
    write_run(train, model, train_summary(), compose("train"))
    layers = {name: rng.random(LAYERS - 1) for name in ("label_rate", "exit_rate", "precision", "recall")}
    pd.DataFrame({"exit_layer": np.arange(1, LAYERS), **layers}).to_parquet(train / "layers.parquet")
    evaluate = root / "evaluate" / place
    for name, exits in (("none", [0] * LAYERS + [8]), ("dynamic_exit", [0, 0, 3, 0, 0, 0, 5])):
        given = [f"policy={name}", *(["policy.gates=a b"] if name != "none" else [])]
        write_run(evaluate / name, model, policy_summary(name, exits), compose("evaluate", given[:1]), (), given)
        samples = {"id": ["a"], "image_id": ["elsewhere"], "question": ["?"], "answer": ["x"], "exit_layer": [2]}
        pd.DataFrame(samples).to_parquet(evaluate / name / "samples.parquet")
    write_run(root / "tables/matched" / place, model, tables_summary(), compose("tables"), ("accuracy_against_cost",))
    write_run(root / "cost" / place, model, cost_summary(), compose("cost"))
    return root


def settings(root: Path, *overrides: str) -> DictConfig:
    own = [f"runs.root='{root}'", f"output_dir='{root / 'report'}'", "samples.count=0"]
    return compose("report", [*own, *overrides])


RECORD = {
    "id": "test-1",
    "kind": "two_hop",
    "question": HOSTILE,
    "reference": "red",
    "answer": "blue",
    "query": "last",
    "part": "",
    "image": "data:image/gif;base64,R0lGODlhAQABAAAAACH5BAEKAAEALAAAAAABAAEAAAICTAEAOw==",
    "rows": 2,
    "columns": 3,
    "mass": [0.1, 0.2, 0.5, 0.3, 0.25, 0.05],
    "maps": [[0.5, 1.0, 1.5, 2.0, 0.5, 0.5]] * LAYERS,
    "top": 4.0,
    "exit_depth": 2,
    "exit_layer": 4,
    "exit_answer": "blue",
    "gates": {"1": [0.125, 0.5], "4": [0.75, 0.5]},
    "answers": {"0": "green", "5": "blue"},
    "words": ["red", HOSTILE],
    "says": [[0] * 6] * LAYERS + [[0, 0, 0, 1, 0, 0]],
}
STAYS = RECORD | {"id": "test-2", "question": "how many ?", "exit_layer": LAYERS, "kind": "count", "answers": {}}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return write_runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def page(root: Path) -> Path:
    """The page of one model with two samples."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report_module, "look_at_samples", lambda cfg, runs: Samples([RECORD, STAYS], "llava_shapes", []))
        return write_report(settings(root, "samples.count=2"))


# ---------------------------------------------------------------- reading a page
@dataclass
class Element:
    tag: str
    attributes: dict[str, str]
    text: str = ""


@dataclass
class Reader(HTMLParser):
    """The elements of a page with the text directly and indirectly in them."""

    elements: list[Element] = field(default_factory=list)
    open_elements: list[Element] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {name: value or "" for name, value in attrs})
        self.elements.append(element)
        if tag not in ("img", "meta", "link", "input", "br"):
            self.open_elements.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self.open_elements[-1].tag == tag, f"</{tag}> closes <{self.open_elements[-1].tag}>"
        self.open_elements.pop()

    def handle_data(self, data: str) -> None:
        for element in self.open_elements:
            element.text += data


def read(path: Path) -> list[Element]:
    reader = Reader()
    reader.feed(path.read_text())
    reader.close()
    assert not reader.open_elements, "an element is not closed"
    return reader.elements


def having(elements: list[Element], tag: str | None = None, attribute: str | None = None) -> list[Element]:
    return [
        each for each in elements if tag in (None, each.tag) and (attribute is None or attribute in each.attributes)
    ]


def summaries(root: Path) -> dict[str, dict[str, Any]]:
    """Run name -> summary, read by this test."""
    names = {"stages": "stages/*/shapes", "exits": "exits/*/shapes", "cost": "cost/*/shapes"}
    names |= {step: f"{step}/*/shapes" for step in ("knockout", "stage_table", "lens")}
    names |= {"tables/matched": "tables/matched/*/shapes", "train/shapes_train": "train/*/shapes_train"}
    names |= {f"evaluate/{policy}": f"evaluate/*/shapes/{policy}" for policy in ("none", "dynamic_exit")}
    return {name: json.loads(next(root.glob(f"{where}/summary.json")).read_text()) for name, where in names.items()}


# ---------------------------------------------------------------- one model
def test_the_page_loads_nothing(page: Path):
    elements = read(page)
    for element in elements:
        assert element.tag not in ("iframe", "object", "embed", "base")
        for name in ("src", "href", "srcset", "action", "poster", "data"):
            value = element.attributes.get(name, "")
            assert value.startswith(("data:", "#")) or not value, f"<{element.tag} {name}={value[:80]}>"
        assert not any(name.startswith("on") for name in element.attributes)
    (style,) = having(elements, "style")
    assert "url(" not in style.text
    assert "@import" not in style.text
    addresses = set(re.findall(r"https?://[^\s\"'<]+", page.read_text()))
    assert addresses == {"http://www.w3.org/2000/svg"}  # the name of a language
    policies = [each.attributes["content"] for each in having(elements, "meta", "http-equiv")]
    assert len(policies) == 1
    assert policies[0].startswith("default-src 'none'; img-src data:;")


def test_every_figure_is_there_with_words_for_it(page: Path, root: Path):
    images = having(read(page), "img")
    for image in images:
        assert len(image.attributes["alt"]) > 20
    drawn = {"exit_layers_dynamic_exit", "gates_shapes_train"}
    assert {file.stem for file in (root / "report/figures").glob("*.png")} == drawn
    in_runs = [file for step in REPORT_STEPS for file in (root / step.name).rglob("*.png")]
    assert len(images) == len(in_runs) + len(drawn) + 1  # the slider's


def test_every_number_is_that_of_the_summary(page: Path, root: Path):
    elements, content = read(page), summaries(root)
    shown = having(elements, attribute="data-key")
    for each in shown:
        value = lookup(content[each.attributes["data-run"]], each.attributes["data-key"])
        expected = "" if value is None else value if isinstance(value, str) else repr(value)
        assert each.attributes["data-order"] == expected, each.attributes["data-key"]
    for each in having(elements, attribute="data-low-key"):
        for end in ("low", "high"):
            value = lookup(content[each.attributes["data-run"]], each.attributes[f"data-{end}-key"])
            assert each.attributes[f"data-{end}"] == ("" if value is None else repr(value))
    text = {each.attributes["data-key"]: each.text for each in shown if each.attributes["data-run"] == "exits"}
    assert text["/findings/contribution_stops/estimates/gain/0"] == "+40.0 points [30.0, 50.0]"
    assert text["/findings/contribution_stops/verdict"] == "found"
    assert text["/findings/exit_depth_depends_on_kind/verdict"] == "not found"
    assert text["/k_star_details/0/layer"].startswith("4")
    runs = {each.attributes["data-run"] for each in shown}
    assert runs == set(content)  # every run has a say


def test_the_page_opens_with_the_answer(page: Path, root: Path):
    opening = page.read_text().partition('<h2 id="answer-first">')[2].partition("</section>")[0]
    exits = summaries(root)["exits"]
    kept, blind = (f"{100 * exits['agreement'][k]:.1f}%" for k in (3, 0))
    assert "used by the first 3 of 6 layers" in opening
    assert f"{kept} of the answers stay, at 57.1% of the decoder" in opening  # (3 + 1) / (6 + 1)
    assert f"{blind} of the answers stay the same" in opening
    assert "Stages by attention: 1 fusion confirmed. By cause: 1 fusion refuted." in opening
    assert opening.count("<img") == 1
    assert "Line plot over the exit layers" in opening


def test_findings_of_causes_say_where(page: Path):
    text = page.read_text()
    assert "Cutting instruction → visual matters most in layers 1 to 3" in text
    assert "−40.5" in text
    curves = re.findall(r'<polyline points="([^"]+)"', text)
    assert "0.0,1.4 120.0,56.0 240.0,0.0" in curves  # -2, -40.5, -1 between their smallest and their largest


def test_effects_have_intervals_where_the_runs_have_them(page: Path):
    text = page.read_text()
    for limits in ("[30.0, 50.0]", "[−1.0, 5.0]", "[50.0, 70.0]", "[−0.30, −0.10]"):
        assert limits in text, limits


def test_what_data_say_is_no_code(page: Path):
    elements = read(page)
    assert HOSTILE in [each.text for each in having(elements, "th")]
    assert not [each for each in having(elements, "img") if each.attributes["src"] == "x"]
    (data,) = (each for each in having(elements, "script") if each.attributes.get("type") == "application/json")
    assert json.loads(data.text)["records"] == [RECORD, STAYS]


def test_controls_have_labels_and_headings_are_in_order(page: Path):
    elements = read(page)
    ids = [each.attributes["id"] for each in having(elements, attribute="id")]
    assert len(ids) == len(set(ids))
    labelled = {each.attributes["for"] for each in having(elements, "label", "for")}
    for control in [*having(elements, "select"), *having(elements, "input")]:
        assert control.attributes["id"] in labelled or control.attributes["type"] == "checkbox"
    for link in having(elements, "a"):
        assert link.attributes["href"].removeprefix("#") in ids
    levels = [int(each.tag[1]) for each in elements if re.fullmatch("h[1-6]", each.tag)]
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    assert having(elements, "html")[0].attributes["lang"] == "en"


def test_the_commands_on_the_page_are_those_that_were_given(page: Path, root: Path):
    text = page.read_text()
    assert "python -m analysis.stages data.limit=8\n" in text
    assert "python -m dyvte.evaluate policy=dynamic_exit &#39;policy.gates=a b&#39;\n" in text
    assert f"# cost: its overrides were not recorded, {root}/cost/llava_shapes/shapes/config.yaml" in text


# ---------------------------------------------------------------- what is missing, what does not fit
def test_what_is_missing_is_named_with_its_command(tmp_path: Path, capsys):
    cfg = compose("stages", ["data.limit=8"])
    write_run(tmp_path / "stages/llava_shapes/shapes", "llava_shapes", stages_summary(np.random.default_rng(0)), cfg)
    stopped = tmp_path / "exits/llava_shapes/shapes"
    stopped.mkdir(parents=True)
    (stopped / "fingerprint.json").write_text("{}")
    text = write_report(settings(tmp_path)).read_text()
    for step in REPORT_STEPS:
        shown = " ".join(word for word in (f"python -m {step.module}", step.arguments) if word)
        assert (f"<code>{shown}</code>" in text) == (step.name != "stages")
    assert f"Stopped in {stopped}" in text
    said = capsys.readouterr().out
    assert "not there: exits" in said
    assert json.loads((tmp_path / "report/summary.json").read_text())["missing"] == [
        each.name for each in REPORT_STEPS[1:]
    ]


def test_without_any_run_nothing_is_written(tmp_path: Path):
    with pytest.raises(
        ConfigError, match=r"no finished run of llava_shapes in .*start with python -m analysis\.stages"
    ):
        write_report(settings(tmp_path))
    assert not list(tmp_path.iterdir())


def test_runs_of_other_weights_are_pointed_out(page: Path, tmp_path: Path):
    assert "different weights" not in page.read_text()
    root = write_runs(tmp_path)
    file = root / "cost/llava_shapes/shapes/fingerprint.json"
    file.write_text(file.read_text().replace("weights of llava_shapes", "later"))
    assert "different weights of the model" in write_report(settings(root)).read_text()


def test_a_summary_that_is_cut_off_is_named(tmp_path: Path):
    root = write_runs(tmp_path)
    file = root / "exits/llava_shapes/shapes/summary.json"
    file.write_text(file.read_text()[:100])
    with pytest.raises(RunFolderError, match=r"exits/llava_shapes/shapes/summary\.json: cannot be read"):
        write_report(settings(root))


def test_numbers_are_shown_without_a_model_that_cannot_be_loaded(root: Path, tmp_path: Path):
    cfg = settings(root, "samples.count=1", "model.path=./nowhere", f"output_dir={tmp_path}/out")
    text = write_report(cfg).read_text()
    assert "No sample images: " in text
    assert 'id="slider-data"' not in text
    assert "contribution_stops" in text


def test_names_with_brackets_are_names(tmp_path: Path):
    write_runs(tmp_path / "runs [old]")
    found, _ = find_runs({step.name: str(settings(tmp_path / "runs [old]").runs[step.name]) for step in REPORT_STEPS})
    names = [run.name for run in found if run.name.startswith(("train", "evaluate"))]
    assert names[:3] == ["train/shapes_train", "evaluate/dynamic_exit", "evaluate/none"]


def test_pointers_find_keys_with_dots_and_slashes():
    content = {"k": {"0.1": [1, {"a/b~c": 2}]}}
    assert lookup(content, pointer("k", "0.1", 1, "a/b~c")) == 2
    assert lookup(content, "/k/0.1/7") is None
    assert lookup(content, "/k/0.1/0/x") is None


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.1234, "share", "12.3%"),
        (-0.02, "points", "−2.0 points"),
        (5.0, "layer", "5"),
        (1.5e9, "count", "1,500,000,000"),
        (None, "ratio", "–"),
    ],
)
def test_numbers_are_written_for_readers(value: float | None, unit: str, text: str):
    assert written(value, unit) == text


def test_an_interval_that_has_no_end_says_so():
    assert interval_text(3, None, "layer") == "[3, –]"


def test_tables_of_experiments_show_what_their_rows_hold(tmp_path: Path):
    rows = [{"gates": "text mean", "accuracy": 0.5, "accuracy_low": 0.4, "accuracy_high": 0.6, "cost": 0.25}]
    run = FinishedRun("tables", "tables/gates", tmp_path, {"experiment": "gates", "rows": rows}, {}, {})
    (table,) = tables_of(run)
    assert table.columns == ["gates", "decoder FLOPs (full = 1)", "right answers"]
    assert [cell.text for cell in table.rows[0]] == ["text mean", "0.250", "50.0% [40.0, 60.0]"]
    assert list(tables_of(replace(run, summary={"rows": []}))) == []


# ---------------------------------------------------------------- several models
def test_several_models_stand_side_by_side(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(report_module, "look_at_samples", lambda cfg, runs: pytest.fail("no model is needed"))
    models = ["llava_shapes", "other_b", "other_c", "other_d"]
    for seed, model in enumerate(models):
        write_runs(tmp_path, model, seed)
    path = write_report(settings(tmp_path, f"compare=[{','.join(models)}]", "samples.count=4"))
    elements = read(path)
    images = having(elements, "img")
    assert sum("One column of line plots a model" in each.attributes["alt"] for each in images) == 1
    drawn = {file.stem for file in (tmp_path / "report/figures").glob("*.png")}
    assert drawn == {"attention_scores", "attention_by_depth", "exits_by_depth"}
    captions = [each.text for each in having(elements, "figcaption")]
    assert {captions.count(model) for model in models} == {9}  # the figures of stages (but maps) and exits
    orders = {}
    for each in having(elements, attribute="data-key"):
        orders.setdefault(each.attributes["data-run"], {})[each.attributes["data-key"]] = each.attributes["data-order"]
    for model in models:
        summary = json.loads((tmp_path / f"exits/{model}/shapes/summary.json").read_text())
        place = f"/overall/bands/accuracy/mean/{LAYERS}"
        assert orders[f"{model}/exits"][place] == repr(lookup(summary, place))
    assert {each.text for each in having(elements, "span") if each.attributes.get("class") == "owner"} == set(models)
    (verdicts,) = (each for each in having(elements, "table") if each.text.strip().startswith("Verdicts"))
    assert all(model in verdicts.text for model in models)
    assert verdicts.text.count("The depth depends") == 1  # one row for all models
    assert verdicts.text.count("not found") == 2 * len(models)  # that one, and the stages


def test_what_another_model_lacks_is_named_with_its_data(tmp_path: Path):
    write_runs(tmp_path)
    path = write_report(settings(tmp_path, "compare=[other_b@english,llava_shapes,llava7b]"))
    text = path.read_text()
    assert "<h1>other_b on english and llava_shapes and llava7b</h1>" in text
    assert "<code>python -m analysis.stages model=llava7b</code>" in text
    assert "<code>python -m analysis.stages model=other_b data=english</code>" in text


def test_a_model_with_data_of_its_own_is_read_from_their_folder(tmp_path: Path):
    patterns = report_module._patterns(settings(tmp_path, "compare=[a@english,b]"), "a@english", ["stages"])
    assert patterns == {"stages": f"{tmp_path}/stages/a/english"}


def test_one_model_is_not_compared(root: Path):
    with pytest.raises(ConfigError, match="give two models or more, or model=llava7b"):
        write_report(settings(root, "compare=[llava7b]"))


def test_pages_have_folders_of_their_own():
    assert compose("report").output_dir == "outputs/report/llava_shapes/shapes"
    assert compose("report", ["compare=[a,b]"]).output_dir == "outputs/report/a+b/shapes"


# ---------------------------------------------------------------- samples
@pytest.fixture(scope="module")
def looked_at() -> tuple[DictConfig, Samples]:
    cfg = compose("report", ["samples.count=2", "data.limit=6", "data.kinds=[two_hop,count]", "device=cpu"])
    return cfg, look_at_samples(cfg, [])


def test_samples_show_what_model_and_gates_do(looked_at):
    cfg, samples = looked_at
    mllm = load("llava_shapes", device="cpu")
    dataset = {sample.id: sample for sample in build_dataset(cfg.data)}
    assert {record["kind"] for record in samples.records} == {"two_hop", "count"}
    for record in samples.records:
        sample = dataset[record["id"]]
        saved, _ = attention_map(mllm, sample, "last")
        assert record["mass"] == pytest.approx(saved["mass"].tolist(), abs=1e-5)
        assert np.array(record["maps"]) == pytest.approx(relative_maps(saved["maps"]).reshape(12, -1), abs=0.006)
        assert record["answer"] == saved["answer"]
        assert [[record["words"][said] for said in layer] for layer in record["says"]] == patch_words(mllm, sample)[0]
        batch = mllm.encode([sample.image], [sample.question])
        with DynamicExit("llava_shapes")(mllm) as run:
            assert mllm.generate(batch) == [record["exit_answer"]]
            assert int(run.exit_layers[0]) == record["exit_layer"]
        assert 0 <= record["exit_depth"] <= 12
        assert list(record["gates"]) == [str(k) for k in range(1, min(record["exit_layer"], 11) + 1)]


def test_even_attention_is_one_everywhere():
    assert (relative_maps(np.full((2, 3, 4), 0.02)) == 1).all()
    assert (relative_maps(np.zeros((1, 2, 2))) == 0).all()


def test_gates_are_those_of_the_train_run_or_those_that_ship(tmp_path: Path):
    cfg = compose("report")
    train = FinishedRun("train", "train/x", tmp_path, {}, {}, {})
    assert gates_for(cfg, train) == "llava_shapes"
    (tmp_path / "gates").mkdir()
    assert gates_for(cfg, train) == str(tmp_path / "gates")
    assert gates_for(compose("report", ["model=llava7b"]), None) is None
    assert gates_for(compose("report", ["samples.gates=null"]), train) is None


def test_maps_of_a_model_that_has_changed_are_pointed_out(tmp_path: Path):
    cfg = compose("report", ["samples.count=1", "data.limit=1", "samples.gates=null", "device=cpu"])
    run = FinishedRun("cost", "cost", tmp_path, {}, {}, {"model": {"weights": "those of yesterday"}})
    samples = look_at_samples(cfg, [run])
    assert "it has changed since these runs: cost" in samples.notes[0]
    assert samples.records[0]["exit_layer"] is None


def test_gates_that_are_not_there_are_an_error():
    cfg = compose("report", ["samples.gates=./nowhere", "data.limit=1"])
    with pytest.raises(ModelError, match="no gates in"):
        look_at_samples(cfg, [])


# ---------------------------------------------------------------- in a browser
@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    program = browser.find()
    if program is None:
        pytest.skip(f"no browser: none of {', '.join(browser.NAMES)} is installed")
    with browser.Browser(program, tmp_path_factory.mktemp("profile")) as running:
        yield running


def test_the_page_works_in_a_browser(page: Path, chromium: browser.Browser):
    def text(element: str) -> str:
        return str(chromium.run(f"document.getElementById('{element}').textContent"))

    chromium.open(page.as_uri())
    assert text("layer-name") == "2"  # where the model looks most
    chromium.run("document.getElementById('layer').focus()")
    chromium.press("ArrowRight", 39)
    assert text("layer-name") == "3"
    assert text("layer-text").startswith("Layer 3 of 0 to 5: 30.0% of the attention is on the image.")
    assert "probability 0.75 (threshold 0.50)" in text("layer-text")
    assert chromium.run("document.getElementById('gone').hidden") is True
    chromium.press("ArrowRight", 39)
    assert chromium.run("document.getElementById('gone').hidden") is False
    assert "after the exit" in chromium.run("document.getElementById('layer').getAttribute('aria-valuetext')")
    assert chromium.run("location.hash") == "#sample=0&layer=4"
    assert text("question") == HOSTILE

    chromium.open(page.as_uri() + "#sample=1&layer=5")
    assert (text("layer-name"), text("question"), text("exit")[:1]) == ("5", "how many ?", str(LAYERS))
    pixels = "document.getElementById('map').getContext('2d').getImageData(0, 0, 3, 2).data"
    alpha = f"[...{pixels}].filter((_, index) => index % 4 === 3)"
    shades = chromium.run(alpha)
    assert shades.index(max(shades)) == 3  # the patch with most attention is the darkest
    assert text("said").startswith("Point at a patch")
    at_the_left_below = "{clientX: box.left + box.width / 6, clientY: box.top + 0.75 * box.height}"
    chromium.run(
        "(() => { const box = document.getElementById('photo').getBoundingClientRect(); "
        f"document.getElementById('over').dispatchEvent(new PointerEvent('pointermove', {at_the_left_below})); }})()"
    )
    assert text("said") == f"Row 2, column 1 says “{HOSTILE}” after layer 5 (logit lens)."
    assert chromium.complaints == []
    assert [each for each in chromium.requests if not each.startswith(("file:", "data:", "about:"))] == []


def test_tables_sort_in_a_browser(page: Path, chromium: browser.Browser):
    chromium.open(page.as_uri())
    table = "[...document.querySelectorAll('table.sortable')].find((each) => each.caption.textContent.startsWith('KL'))"
    column = f"[...{table}.tBodies[0].rows].map((row) => row.cells[0].dataset.order)"
    heading = f"{table}.tHead.rows[0].cells[0]"
    assert chromium.run(column) == ["0.003", "0.0001"]
    for order, expected in (("ascending", ["0.0001", "0.003"]), ("descending", ["0.003", "0.0001"])):
        chromium.run(f"{heading}.querySelector('button').click()")
        assert chromium.run(f"{heading}.getAttribute('aria-sort')") == order
        assert chromium.run(column) == expected
    layer = f"{table}.tHead.rows[0].cells[1].querySelector('button')"
    for _ in range(2):  # what is not known comes last in both orders
        chromium.run(f"{layer}.click()")
        assert chromium.run(f"[...{table}.tBodies[0].rows].map((row) => row.cells[1].dataset.order)") == ["4", ""]


@pytest.mark.parametrize("width", [320, 390, 1280])
def test_the_page_fits_the_window(page: Path, chromium: browser.Browser, width: int):
    chromium.open(page.as_uri(), width)
    assert chromium.run("document.documentElement.scrollWidth") <= width
    assert chromium.run("[...document.querySelectorAll('.box')].every((box) => box.clientWidth <= innerWidth)")
    opening = "document.querySelector('.opening .frame')"
    assert chromium.run(f"{opening}.scrollWidth <= {opening}.clientWidth")  # the answer is seen whole
