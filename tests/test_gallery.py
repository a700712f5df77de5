"""The gallery: every picture of README.md and docs/ is listed, and as new as its numbers and the weights."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from analysis.measuring.shipped import shipped_files
from docs.tooling import gallery
from dyvte.errors import ConfigError
from dyvte.loading import load
from dyvte.runs import store
from dyvte.runs.config import compose

ROOT = Path(__file__).parents[1]
CFG = compose("gallery")
IMAGES = ROOT / CFG.images
REPAIR = "out of date: make figures"


@pytest.fixture(scope="module")
def sources() -> dict:
    return json.loads((IMAGES / gallery.SOURCES).read_text())


def test_pictures_are_listed_drawn_and_shown(sources: dict) -> None:
    listed = set(CFG.pictures)
    assert set(gallery.shown_by(ROOT, Path(CFG.images))) == listed, "what pages show and conf/gallery.yaml lists differ"
    assert set(sources) == listed, REPAIR
    assert {file.name for file in IMAGES.glob("*.png")} == listed, REPAIR
    for name, picture in CFG.pictures.items():
        assert picture.numbers, f"{name} has no numbers to be checked by"
        assert picture.alt, f"{name} says nothing to those who cannot see it"


def test_pictures_are_of_the_weights_that_ship(sources: dict) -> None:
    shipped = shipped_files()
    for name, source in sources.items():
        for part in {"weights", "gates"} & set(source):
            assert source[part] == shipped[part], f"{name}: {REPAIR}"
        assert hashlib.sha256((IMAGES / name).read_bytes()).hexdigest()[:16] == source["picture"], f"{name}: {REPAIR}"


def test_pictures_show_the_numbers_of_the_runs_that_are_there(sources: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """CI runs `make stages` first, so code that changes the numbers of stages.png is found out there."""
    monkeypatch.chdir(ROOT)
    weights = store.model_fingerprint(load("llava_shapes"))["weights"]
    for name, source in sources.items():
        for folder in gallery.folders_of(name, CFG):
            files = [folder / "fingerprint.json", folder / "summary.json"]
            if not all(file.is_file() for file in files) or gallery.run_digest(folder) != source["run"]:
                continue
            if json.loads(files[0].read_text())["model"]["weights"] == weights:
                summary = json.loads(files[1].read_text())
                now = {key: gallery.select(summary, key) for key in source["numbers"]}
                assert gallery.look_the_same(now, source["numbers"]), f"{name} differs from {folder}: {REPAIR}"


def test_pages_are_those_of_the_pictures(sources: dict) -> None:
    assert (ROOT / CFG.page).read_text() == gallery.gallery_page(CFG, sources), REPAIR
    readme = (ROOT / CFG.readme).read_text()
    assert readme == gallery.with_gallery(readme, CFG, sources), REPAIR


def test_numbers_that_look_the_same() -> None:
    numbers = {"a": [0.5, 0.25, 0.001], "b": "other", "c": None, "d": [[1.0, None], [3]]}
    assert gallery.look_the_same(numbers, {**numbers, "a": [0.5004, 0.25, 0.004]})
    for change in (
        {"a": [0.5, 0.27, 0.001]},
        {"a": [0.5, 0.25]},
        {"b": "three_stage"},
        {"c": 3},
        {"d": [[1.0, 2], [3]]},
    ):
        assert not gallery.look_the_same(numbers, {**numbers, **change}), change
    assert not gallery.look_the_same(numbers, {"a": numbers["a"]})
    assert gallery.rounded({"a": [0.123456789, 3, None, "x", float("nan")]}) == {"a": [0.1235, 3, None, "x", None]}


def test_keys_select_from_a_summary() -> None:
    summary = {"rows": [{"cost": 1.0}, {"cost": 0.5}], "k": {"0.1": 3, "mean": [4]}}
    assert gallery.select(summary, "rows.*.cost") == [1.0, 0.5]
    assert gallery.select(summary, "rows.1") == {"cost": 0.5}
    assert gallery.select(summary, "k.mean.0") == 4
    for key in ("rows.2", "k.median", "rows.cost"):
        with pytest.raises(ConfigError, match="nothing under"):
            gallery.select(summary, key)


def test_pictures_of_a_page_are_found(tmp_path: Path) -> None:
    (tmp_path / "docs" / "testbed").mkdir(parents=True)
    (tmp_path / "README.md").write_text('![a](docs/images/a.png) ![b](https://x.org/b.png)\n<img alt="" src="c.png">')
    (tmp_path / "docs" / "page.md").write_text("![a](images/a.png) ![w](testbed/world.png) [no picture](d.png)")
    shown = gallery.shown_by(tmp_path, Path("docs/images"))
    assert shown == {"a.png": {"README.md", "docs/page.md"}, "c.png": {"README.md"}}


def test_a_small_gallery_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").write_text(f"before\n{gallery.START}\nold\n{gallery.END}\nafter\n")
    cfg = compose("gallery")
    OmegaConf.set_struct(cfg, False)
    for name in [each for each in cfg.runs if each != "stages"]:
        del cfg.runs[name]
    for name in [each for each in cfg.pictures if each not in ("stages.png", "attention_map.png")]:
        del cfg.pictures[name]
    cfg.runs.stages.settings = ["data.limit=6", "batch_size=3", "bootstrap=20", "permutations=19", "maps.count=2"]
    stray = tmp_path / "docs" / "images" / "stray.png"
    stray.parent.mkdir(parents=True)
    stray.write_bytes(b"")

    def made() -> dict[str, bytes]:
        return {str(file.relative_to(tmp_path)): file.read_bytes() for file in sorted(tmp_path.glob("docs/**/*.*"))}

    gallery.gallery(cfg)
    first, readme = made(), (tmp_path / "README.md").read_text()
    images = {"docs/images/stages.png", "docs/images/attention_map.png"}
    assert set(first) == images | {"docs/images/sources.json", "docs/gallery.md"}
    assert readme.startswith(f"before\n{gallery.START}\n![")
    assert readme.endswith(f"\n{gallery.END}\nafter\n")
    assert "(docs/images/stages.png)" in readme
    assert "6 questions" in readme
    assert "](images/stages.png)" in first["docs/gallery.md"].decode()
    assert set(gallery.shown_by(tmp_path, Path("docs/images"))) == {"stages.png", "attention_map.png"}
    gallery.gallery(cfg)  # nothing to do
    assert made() == first
    cfg.runs.stages.settings[0] = "data.limit=5"  # another run in its folder is replaced
    gallery.gallery(cfg)
    before, after = (json.loads(each["docs/images/sources.json"])["stages.png"] for each in (first, made()))
    assert before["run"] != after["run"]
    assert before["picture"] != after["picture"]
    assert not gallery.look_the_same(before["numbers"], after["numbers"])
