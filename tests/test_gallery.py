"""What a command makes for README.md and docs/: as new as what it is made from, listed, and right on a small run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf

from docs.tooling import gallery
from docs.tooling.generated import RECORD, out_of_date, read_record, write_generated
from docs.tooling.hero import draw_hero, hero_caption
from dyvte.errors import ConfigError
from dyvte.runs.config import compose

ROOT = Path(__file__).parents[1]
CFG = compose("gallery")
IMAGES = ROOT / CFG.images


@pytest.fixture(scope="module")
def sources() -> dict[str, Any]:
    return json.loads((IMAGES / gallery.SOURCES).read_text())


def test_a_run_that_the_gallery_has_not_is_refused() -> None:
    with pytest.raises(ConfigError, match="--only entropy: the gallery's runs are stages, exits, "):
        gallery.gallery(CFG, ["entropy"])


# ------------------------------------------------------------------ one rule of staleness


def test_nothing_that_a_command_made_is_out_of_date() -> None:
    assert not out_of_date()


def test_everything_that_pages_show_is_known_to_the_writer() -> None:
    listed = {*CFG.pictures, CFG.hero.name}
    assert set(gallery.shown_by(ROOT, Path(CFG.images))) == listed, "what pages show and conf/gallery.yaml lists differ"
    assert {file.name for file in IMAGES.glob("*.png")} == listed
    made = set(read_record())
    assert {f"{CFG.images}/{name}" for name in listed} <= made
    assert {f"notebooks/{file.name}" for file in (ROOT / "notebooks").glob("*.ipynb")} <= made
    assert {"README.md#gallery", "docs/comparison.md#comparison", "docs/models.md", "docs/testbed.md"} <= made


def test_whatever_happens_to_a_file_or_its_source_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    page.write_text("mine\n<!-- part -->\nold\n<!-- /part -->\nmine too\n")
    write_generated("docs/page.md", "new", "make part", ("weights",), "part", root=tmp_path)
    write_generated("docs/picture.png", b"\x00", "make picture", ("gates",), root=tmp_path)
    assert page.read_text() == "mine\n<!-- part -->\nnew\n<!-- /part -->\nmine too\n"
    assert out_of_date(tmp_path) == []
    page.write_text(page.read_text().replace("mine", "edited"))  # outside of the part
    assert out_of_date(tmp_path) == []
    page.write_text(page.read_text().replace("new", "edited"))
    (late,) = out_of_date(tmp_path)
    assert late == "docs/page.md#part is not what its command wrote: run make part"
    (tmp_path / "docs" / "picture.png").unlink()
    assert [each.split(" ")[1:3] for each in out_of_date(tmp_path)] == [["is", "not"], ["is", "missing:"]]
    write_generated("docs/picture.png", b"\x00", "make picture", ("gates",), root=tmp_path)
    write_generated("docs/page.md", "new", "make part", ("weights",), "part", root=tmp_path)
    record = read_record(tmp_path)
    for entry in record.values():
        entry["made_from"] = dict.fromkeys(entry["made_from"], "0" * 16)
    (tmp_path / RECORD).write_text(json.dumps(record))
    assert [each.split(": ")[0] for each in out_of_date(tmp_path)] == [
        "docs/page.md#part was made from other weights than ship",
        "docs/picture.png was made from other gates than ship",
    ]


# ---------------------------------------------------------- numbers, regenerated in small


@pytest.fixture(scope="module")
def small_gallery(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A gallery of two pictures from a run on 24 questions, with its settings."""
    folder = tmp_path_factory.mktemp("gallery")
    (folder / "README.md").write_text("before\n<!-- gallery -->\nold\n<!-- /gallery -->\nafter\n")
    (folder / CFG.images).mkdir(parents=True)
    (folder / CFG.images / "stray.png").write_bytes(b"")
    cfg = compose("gallery")
    OmegaConf.set_struct(cfg, False)
    cfg.runs = {"stages": cfg.runs.stages}
    cfg.pictures = {name: cfg.pictures[name] for name in ("stages.png", "attention_map.png")}
    cfg.hero = None
    cfg.runs.stages.settings = ["data.limit=24", "bootstrap=200", "maps.count=2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        gallery.gallery(cfg)
    return folder, cfg


def test_a_gallery_is_pictures_their_numbers_and_a_page(small_gallery: tuple[Path, Any]) -> None:
    folder, _ = small_gallery
    images = folder / CFG.images
    assert {file.name for file in images.iterdir()} == {"stages.png", "attention_map.png", "sources.json"}
    page = (folder / CFG.page).read_text()
    assert "](images/stages.png)" in page
    assert "24 questions" in page
    assert set(gallery.shown_by(folder, Path(CFG.images))) == {"stages.png", "attention_map.png"}
    assert out_of_date(folder) == []


def test_published_attention_is_what_a_small_run_finds(small_gallery: tuple[Path, Any], sources: dict) -> None:
    """The curves that the pages show, over all questions, lie where the bands of other few questions allow."""
    folder, _ = small_gallery
    summary = json.loads((folder / "outputs/gallery/stages/summary.json").read_text())
    published = sources["stages.png"]["numbers"]["curves"]
    for curve, values in summary["curves"].items():
        here, there = np.array(values), np.array(published[curve])
        assert np.corrcoef(np.log(here), np.log(there))[0, 1] > 0.8, curve
        assert np.abs(np.log(here / there)).max() < 0.5, curve


def test_a_run_of_other_settings_is_replaced(small_gallery: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, cfg = small_gallery
    monkeypatch.chdir(folder)
    before = json.loads((folder / "outputs/gallery/stages/summary.json").read_text())["num_samples"]
    run_cfg = gallery.finish("stages", cfg)  # nothing to do
    cfg.runs.stages.settings[0] = "data.limit=6"
    gallery.finish("stages", cfg)
    after = json.loads((Path(run_cfg.output_dir) / "summary.json").read_text())["num_samples"]
    assert (before, after) == (24, 6)


# ------------------------------------------------------------------------ first picture


def test_the_first_picture_says_what_its_numbers_say(sources: dict) -> None:
    numbers = {name: each["numbers"] for name, each in sources.items()}
    stops = numbers["exits.png"]["findings.contribution_stops.exit_layer"]
    drawn = draw_hero(numbers)
    assert [len(axis.patches) >= 12 for axis in (drawn.axes[0], drawn.axes[2])] == [True, True]
    np.testing.assert_allclose(drawn.axes[1].lines[0].get_ydata(), numbers["exits.png"]["agreement"])
    assert f"first {stops}." in hero_caption(numbers)
    numbers["exits.png"] = {**numbers["exits.png"], "findings.contribution_stops.exit_layer": None}
    assert "No layer was found" in hero_caption(numbers)
    assert not drawn.axes[0].texts
    assert not draw_hero(numbers).axes[1].texts


# ------------------------------------------------------------------------------ details


def test_keys_select_from_a_summary() -> None:
    summary = {"rows": [{"cost": 1.0}, {"cost": 0.5}], "k": {"0.1": 3, "mean": [4]}}
    assert gallery.select(summary, "rows.*.cost") == [1.0, 0.5]
    assert gallery.select(summary, "rows.1") == {"cost": 0.5}
    assert gallery.select(summary, "k.mean.0") == 4
    for key in ("rows.2", "k.median", "rows.cost"):
        with pytest.raises(ConfigError, match="nothing under"):
            gallery.select(summary, key)
    assert gallery.rounded({"a": [0.123456789, 3, None, "x", float("nan")]}) == {"a": [0.1235, 3, None, "x", None]}


def test_pictures_of_a_page_are_found(tmp_path: Path) -> None:
    (tmp_path / "docs" / "testbed").mkdir(parents=True)
    (tmp_path / "README.md").write_text('![a](docs/images/a.png) ![b](https://x.org/b.png)\n<img alt="" src="c.png">')
    (tmp_path / "docs" / "page.md").write_text("![a](images/a.png) ![w](testbed/world.png) [no picture](d.png)")
    shown = gallery.shown_by(tmp_path, Path("docs/images"))
    assert shown == {"a.png": {"README.md", "docs/page.md"}, "c.png": {"README.md"}}
