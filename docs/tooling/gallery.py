"""`python -m docs.tooling.gallery` (`make figures`): every picture of README.md and docs/, from runs on it.

Pictures are copied from run folders, or drawn from their numbers. `sources.json` beside them keeps the numbers that
each one shows and digests of the weights and of the picture, by which a test tells that a picture is out of date.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from omegaconf import DictConfig

from analysis import exits, stages, tables
from analysis.in_notebook import show
from analysis.measuring.shipped import shipped_files
from analysis.plots import paper as plots_paper
from analysis.statistics.markdown import replace_between
from dyvte import evaluate
from dyvte.data import build_dataset
from dyvte.errors import ConfigError, DyvteError, RunFolderError
from dyvte.runs.config import compose
from dyvte.runs.store import plain, write_atomic, write_json

SOURCES = "sources.json"
DIGITS = 4
"""Significant digits of the numbers that are kept."""
TOLERANCE = 0.02
"""Numbers closer than this share of the largest one beside them look the same in a picture."""
FOUND = ("content", "samples", "policy_state", "gates")
"""Entries of a fingerprint that follow from weights and code, not from what was asked for."""
START, END = "<!-- gallery -->", "<!-- /gallery -->"
OWN_PAGES = ("docs/testbed",)
"""Pictures below these folders are made by other commands (`make testbed-eval`), with their page."""

COMMANDS: dict[str, Callable[[DictConfig], Any]] = {
    "stages": stages.main,
    "exits": exits.main,
    "evaluate": evaluate.evaluate,
    "tables": tables.tables,
}

# ------------------------------------------------------------------------------- runs


def settings_of(run: str, cfg: DictConfig) -> tuple[str, list[str]]:
    """Command and overrides of a run of the gallery, its folder included.

    Raises:
        ConfigError: the command is not one of those that draw.
    """
    command, folder = cfg.runs[run].command, Path(cfg.runs_dir)
    if command not in COMMANDS:
        raise ConfigError(f"conf/gallery.yaml: run {run} has command {command!r}; choose from {sorted(COMMANDS)}")
    places = {
        "evaluate": [f"comparison_dir={folder / run}", f"reference_dir={folder / 'reference'}"],
        "tables": [f"output_dir={folder / run}", f"reference_dir={folder / 'reference'}"],
    }
    return command, [*cfg.runs[run].settings, *places.get(command, [f"output_dir={folder / run}"])]


def finish(run: str, cfg: DictConfig) -> DictConfig:
    """Start or continue a run; one of other weights, data or settings is replaced. Returns its configuration."""
    command, overrides = settings_of(run, cfg)
    run_cfg = compose(command, overrides)
    try:
        COMMANDS[command](run_cfg)
    except RunFolderError:
        run_cfg = compose(command, [*overrides, "overwrite=true"])
        COMMANDS[command](run_cfg)
    return run_cfg


# ----------------------------------------------------------------------------- drawing


def attention_map(run_cfg: DictConfig) -> bytes:
    """The second attention map of a stages run: the first is of an arithmetic question, which needs no image."""
    name = stages.file_name(plots_paper.read_summary(run_cfg.output_dir)["maps"][1]["id"])
    return (Path(run_cfg.output_dir) / "figures" / f"map_{name}.png").read_bytes()


def exit_examples(run_cfg: DictConfig) -> bytes:
    """The paper's Fig. 6 from a run of `dyvte.evaluate`."""
    summary = plots_paper.read_summary(run_cfg.output_dir)
    samples = pd.read_parquet(Path(run_cfg.output_dir) / "samples.parquet")
    examples = plots_paper.exit_examples_of(samples, build_dataset(run_cfg.data), images=6)
    return show(plots_paper.exit_examples(examples, summary["num_layers"], title_of(summary))).png


def accuracy_against_flops(run_cfg: DictConfig) -> bytes:
    """Policies beside every fixed exit from a run of `dyvte.evaluate`."""
    return show(plots_paper.policies(run_cfg.comparison_dir)).png


def title_of(summary: Mapping[str, Any]) -> str:
    """Policy, model and data."""
    return f"{summary['policy'].replace('_', ' ')}: {summary['model']} on {summary['data']}"


DRAWN: dict[str, Callable[[DictConfig], bytes]] = {
    "attention_map": attention_map,
    "exit_examples": exit_examples,
    "accuracy_against_flops": accuracy_against_flops,
}


def draw(figure: str, run_cfg: DictConfig) -> bytes:
    """A picture, as PNG.

    Raises:
        ConfigError: the run has no such figure.
    """
    if figure in DRAWN:
        return DRAWN[figure](run_cfg)
    file = Path(run_cfg.output_dir) / "figures" / f"{figure}.png"
    if not file.is_file():
        raise ConfigError(f"conf/gallery.yaml: {run_cfg.output_dir} has no figure {figure!r}")
    return file.read_bytes()


# ----------------------------------------------------------------------------- sources


def select(summary: Any, key: str) -> Any:
    """The value under a dotted key; `*` collects it over a list, numbers index one: `rows.*.cost`, `maps.0.mass`.

    Raises:
        ConfigError: there is nothing under this key.
    """
    first, _, rest = key.partition(".")
    try:
        if first == "*":
            return [select(each, rest) if rest else each for each in summary]
        value = summary[int(first)] if isinstance(summary, list) else summary[first]
    except (KeyError, IndexError, ValueError, TypeError) as error:
        raise ConfigError(f"conf/gallery.yaml: summary.json holds nothing under {key!r}") from error
    return select(value, rest) if rest else value


def rounded(value: Any) -> Any:
    """Numbers to a few significant digits, everything else as it is."""
    if isinstance(value, Mapping):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    return value


def look_the_same(one: Any, other: Any) -> bool:
    """Whether a picture of `one` cannot be told from a picture of `other`: numbers up to a share of the largest beside
    them (other machines round otherwise), everything else exactly.
    """  # noqa: D205
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(look_the_same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        if len(one) != len(other):
            return False
        scale = max((abs(each) for each in [*one, *other] if _is_number(each)), default=0.0)
        pairs = zip(one, other, strict=True)
        return all(
            abs(a - b) <= TOLERANCE * scale if _is_number(a) and _is_number(b) else look_the_same(a, b)
            for a, b in pairs
        )
    if _is_number(one) and _is_number(other):
        return bool(abs(one - other) <= TOLERANCE * max(abs(one), abs(other)))
    return bool(one == other)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def run_digest(folder: Path) -> str:
    """Digest of what a run was asked to do: its data and settings, without the digests of what it found there."""
    fingerprint = json.loads((folder / "fingerprint.json").read_text())
    asked = [
        sorted((key, value) for key, value in fingerprint[part].items() if key not in FOUND)
        for part in ("data", "settings")
    ]
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]


def source_of(name: str, cfg: DictConfig, folder: Path, png: bytes) -> dict[str, Any]:
    """What `sources.json` keeps of a picture that was drawn from the run in `folder`."""
    summary = plots_paper.read_summary(folder)
    picture = cfg.pictures[name]
    run = cfg.runs[picture.run]
    module = f"{'dyvte' if run.command == 'evaluate' else 'analysis'}.{run.command}"
    uses_gates = run.command in ("evaluate", "tables")
    return {
        "command": " ".join(["python -m", module, *run.settings]),
        "figure": picture.figure,
        **{key: value for key, value in shipped_files().items() if key == "weights" or uses_gates},
        "run": run_digest(folder),
        "picture": hashlib.sha256(png).hexdigest()[:16],
        "caption": " ".join(picture.caption.format_map(summary).split()),
        "numbers": rounded(plain({key: select(summary, key) for key in picture.numbers})),
    }


def folders_of(name: str, cfg: DictConfig) -> Iterator[Path]:
    """Where a run with the settings that a picture was drawn from may lie: the gallery's folder, and the default."""
    run = cfg.pictures[name].run
    command, overrides = settings_of(run, cfg)
    for settings in (overrides, list(cfg.runs[run].settings)):
        yield Path(compose(command, settings).output_dir)


# ------------------------------------------------------------------------------- pages


def pictures_in(text: str) -> list[str]:
    """Local pictures that a Markdown text shows, as written there."""
    found = re.findall(r"!\[[^\]]*\]\(([^)\s]+)", text) + re.findall(r"<img[^>]*\ssrc=[\"']([^\"']+)", text)
    return [each for each in found if not re.match(r"[a-z]+:", each)]


def shown_by(root: Path, images: Path) -> dict[str, set[str]]:
    """Picture, relative to `root` -> pages of README.md and docs/ that show it, but for those with their own command.

    Args:
        root: the repository.
        images: folder of the gallery's pictures; they are named by their file alone.
    """
    shown: dict[str, set[str]] = {}
    for page in [root / "README.md", *sorted((root / "docs").rglob("*.md"))]:
        for each in pictures_in(page.read_text()):
            file = (page.parent / each).resolve().relative_to(root.resolve())
            if not file.as_posix().startswith(OWN_PAGES):
                name = file.name if file.parent == images else file.as_posix()
                shown.setdefault(name, set()).add(page.relative_to(root).as_posix())
    return shown


def entry(name: str, cfg: DictConfig, source: Mapping[str, Any], page: Path) -> str:
    """A picture with its caption, as Markdown for `page`."""
    up = "../" * len(page.parent.parts)
    caption = re.sub(r"\]\((?![a-z]+:)", f"]({up}", source["caption"])  # links there are relative to the repository
    link = Path(os.path.relpath(Path(cfg.images) / name, page.parent)).as_posix()
    return f"![{cfg.pictures[name].alt}]({link})\n\n*{caption}*"


def gallery_page(cfg: DictConfig, sources: Mapping[str, Any]) -> str:
    """The page that shows every picture."""
    parts = [
        "# Gallery\n\nEvery picture here was drawn from the model that ships with the toolkit by `make figures`, which "
        "also wrote this page. The model is small and made to check the tool on: what it shows is no evidence about "
        "larger models ([docs/testbed.md](testbed.md))."
    ]
    for name, source in sources.items():
        parts.append(f"{entry(name, cfg, source, Path(cfg.page))}\n\nFrom `{source['command']}`.")
    return "\n\n".join(parts) + "\n"


def with_gallery(text: str, cfg: DictConfig, sources: Mapping[str, Any]) -> str:
    """README.md with the pictures that belong there between its two comments; unchanged without them."""
    shown = [entry(name, cfg, sources[name], Path(cfg.readme)) for name in sources if cfg.pictures[name].readme]
    return replace_between(text, START, END, "\n\n".join(shown))


# ----------------------------------------------------------------------------- command


def gallery(cfg: DictConfig) -> None:
    """Finish the runs, draw the pictures, write the pages."""
    images = Path(cfg.images)
    images.mkdir(parents=True, exist_ok=True)
    runs = {run: finish(run, cfg) for run in cfg.runs}
    sources = {}
    for name, picture in cfg.pictures.items():
        run_cfg = runs[picture.run]
        png = draw(picture.figure, run_cfg)
        sources[name] = source_of(name, cfg, Path(run_cfg.output_dir), png)
        write_atomic(images / name, lambda out, png=png: out.write(png))
    plt.close("all")
    for left in images.glob("*.png"):
        if left.name not in sources:
            left.unlink()
    write_json(images / SOURCES, sources)
    page = gallery_page(cfg, sources)
    write_atomic(Path(cfg.page), lambda out: out.write(page.encode()))
    readme = with_gallery(Path(cfg.readme).read_text(), cfg, sources)
    write_atomic(Path(cfg.readme), lambda out: out.write(readme.encode()))
    print(f"{len(sources)} pictures in {images}, shown on {cfg.page}")


def main() -> None:
    """Draw everything. An ordinary function calls the commands: within Hydra's they could not be composed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", help="key=value, see conf/gallery.yaml")
    try:
        gallery(compose("gallery", parser.parse_args().settings))
    except DyvteError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
