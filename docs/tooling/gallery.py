"""`python -m docs.tooling.gallery` (`make figures`): every picture of README.md and docs/, from runs on it.

Pictures are copied from run folders, or drawn from their numbers. `sources.json` beside them keeps the numbers that
each one shows; README.md's first picture is drawn from those of three others.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from omegaconf import DictConfig

from analysis import exits, kept_positions, knockout, lens, plots, stages, tables
from analysis.in_notebook import read_summary, show
from analysis.measuring.attention import file_name
from analysis.plots.style import png_of
from docs.tooling.generated import read_record, write_generated
from docs.tooling.hero import draw_hero, hero_caption
from dyvte import evaluate
from dyvte.data import build_dataset
from dyvte.errors import ConfigError, DyvteError, RunFolderError
from dyvte.runs.config import compose
from dyvte.runs.store import plain, write_json

SOURCES = "sources.json"
DIGITS = 4
"""Significant digits of the numbers that are kept."""
USE_GATES = ("evaluate", "tables")
"""Commands whose numbers depend on the shipped gates too."""
COMMAND, SECTION = "make figures", "gallery"
OWN_PAGES = ("docs/testbed", "docs/stages/", "docs/explorer/")
"""Pictures below these folders are made by other commands, with their page (see docs/generated.json)."""

COMMANDS: dict[str, Callable[[DictConfig], Any]] = {
    "stages": stages.main,
    "exits": exits.main,
    "knockout": knockout.main,
    "lens": lens.main,
    "kept_positions": kept_positions.main,
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
    name = file_name(read_summary(run_cfg.output_dir)["maps"][1]["id"])
    return (Path(run_cfg.output_dir) / "figures" / f"map_{name}.png").read_bytes()


def exit_examples(run_cfg: DictConfig) -> bytes:
    """The paper's Fig. 6 from a run of `dyvte.evaluate`."""
    summary = read_summary(run_cfg.output_dir)
    samples = pd.read_parquet(Path(run_cfg.output_dir) / "samples.parquet")
    examples = plots.first_exit_examples(samples, build_dataset(run_cfg.data), images=6)
    return show(plots.draw_exit_examples(examples, summary["num_layers"], title_of(summary))).png


def accuracy_against_flops(run_cfg: DictConfig) -> bytes:
    """Policies beside every fixed exit from a run of `dyvte.evaluate`."""
    return show(plots.draw_policies_against_fixed_exits(run_cfg.comparison_dir)).png


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


def source_of(name: str, cfg: DictConfig, folder: Path) -> dict[str, Any]:
    """What `sources.json` keeps of a picture that was drawn from the run in `folder`."""
    summary = read_summary(folder)
    picture = cfg.pictures[name]
    run = cfg.runs[picture.run]
    module = f"{'dyvte' if run.command == 'evaluate' else 'analysis'}.{run.command}"
    return {
        "command": " ".join(["python -m", module, *run.settings]),
        "caption": " ".join(picture.caption.format_map(summary).replace("not_found", "not found").split()),
        "numbers": rounded(plain({key: select(summary, key) for key in picture.numbers})),
    }


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


def entry(name: str, alt: str, cfg: DictConfig, sources: Mapping[str, Any], page: Path) -> str:
    """A picture with its caption, as Markdown for `page`."""
    caption = re.sub(  # links there are from the repository
        r"\]\((?![a-z]+:)([^)]+)", lambda link: f"]({os.path.relpath(link[1], page.parent)}", sources[name]["caption"]
    )
    link = Path(os.path.relpath(Path(cfg.images) / name, page.parent)).as_posix()
    return f"![{alt}]({link})\n\n*{caption}*"


def pictures_of_other_pages(cfg: DictConfig) -> list[str]:
    """Pictures that another command made, with that command and the page that they are on."""
    root, record, parts = Path.cwd(), read_record(Path.cwd()), []
    for page in sorted((root / "docs").rglob("*.md")):
        for alt, link in re.findall(r"!\[([^\]]*)\]\((?![a-z]+:)([^)\s]+)\)", page.read_text()):
            file = (page.parent / link).resolve()
            name = os.path.relpath(file, root.resolve())
            if page != root / cfg.page and name in record and not name.startswith(f"{cfg.images}/"):
                shown = os.path.relpath(file, (root / cfg.page).resolve().parent)
                where = os.path.relpath(page, (root / cfg.page).parent)
                parts.append(f"![{alt}]({shown})\n\nFrom `{record[name]['command']}`, on [{where}]({where}).")
    return parts


def gallery_page(cfg: DictConfig, sources: Mapping[str, Any]) -> str:
    """The page that shows every picture."""
    parts = [
        "# Gallery\n\nEvery picture here was drawn from the model that ships with the toolkit by `make figures`, which "
        "also wrote this page. The model is small and made to check the tool on: what it shows is no evidence about "
        "larger models ([docs/testbed.md](testbed.md))."
    ]
    for name in cfg.pictures:
        shown = entry(name, cfg.pictures[name].alt, cfg, sources, Path(cfg.page))
        parts.append(f"{shown}\n\nFrom `{sources[name]['command']}`.")
    if others := pictures_of_other_pages(cfg):
        parts += ["## On other pages", *others]
    return "\n\n".join(parts) + "\n"


def hero_of(sources: Mapping[str, Any]) -> tuple[bytes, dict[str, Any]]:
    """The picture that is drawn from the numbers of others, as PNG, and what `sources.json` keeps of it."""
    numbers = {name: each["numbers"] for name, each in sources.items()}
    return png_of(draw_hero(numbers), dpi=160), {"command": COMMAND, "caption": hero_caption(numbers), "numbers": {}}


def gallery(cfg: DictConfig, only: Sequence[str] = ()) -> None:
    """Finish the runs, draw the pictures, write the pages.

    Args:
        cfg: conf/gallery.yaml.
        only: names of runs, beside which everything stays as it is; none for all.
    """
    if unknown := set(only) - set(cfg.runs):
        raise ConfigError(f"--only {sorted(unknown)[0]}: the gallery's runs are {', '.join(cfg.runs)}")
    images = Path(cfg.images)
    kept = json.loads((images / SOURCES).read_text()) if only else {}
    runs = {run: finish(run, cfg) for run in cfg.runs if not only or run in only}
    sources = {}
    for name, picture in cfg.pictures.items():
        if picture.run not in runs:
            sources[name] = kept[name]
            continue
        run_cfg = runs[picture.run]
        made_from = ("weights", "gates") if cfg.runs[picture.run].command in USE_GATES else ("weights",)
        write_generated(images / name, draw(picture.figure, run_cfg), COMMAND, made_from)
        sources[name] = source_of(name, cfg, Path(run_cfg.output_dir))
    publish(cfg, sources)
    plt.close("all")
    for left in images.glob("*.png"):
        if left.name not in sources:
            left.unlink()


def publish(cfg: DictConfig, sources: dict[str, Any]) -> None:
    """The pages, and the picture that needs no run of its own; `sources` gains it."""
    images, readme = Path(cfg.images), Path(cfg.readme)
    if cfg.hero:
        png, sources[cfg.hero.name] = hero_of(sources)
        write_generated(images / cfg.hero.name, png, COMMAND, ("weights", "gates"))
        write_generated(readme, entry(cfg.hero.name, cfg.hero.alt, cfg, sources, readme), COMMAND, section=SECTION)
    write_json(images / SOURCES, sources)
    write_generated(cfg.page, gallery_page(cfg, sources), COMMAND)
    print(f"{len(sources)} pictures in {images}, shown on {cfg.page}")


def main() -> None:
    """Draw everything. An ordinary function calls the commands: within Hydra's they could not be composed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", help="key=value, see conf/gallery.yaml")
    parser.add_argument("--pages", action="store_true", help="run nothing: pages and first picture from sources.json")
    parser.add_argument("--only", nargs="+", default=(), metavar="RUN", help="only the pictures of these runs")
    given = parser.parse_args()
    try:
        cfg = compose("gallery", given.settings)
        if given.pages:
            kept = json.loads((Path(cfg.images) / SOURCES).read_text())
            publish(cfg, {name: kept[name] for name in cfg.pictures})
        else:
            gallery(cfg, given.only)
    except DyvteError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
