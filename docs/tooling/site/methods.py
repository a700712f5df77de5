"""A hook of mkdocs: a page for every method of the registry, with what the repository knows about it.

Its class says label, source and needs, its file in `conf/policy/` the settings, `CITATION.cff` the paper's title;
`docs/comparison.json` and the gallery's `sources.json` hold what it came to on the shipped model.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))  # mkdocs loads this file alone

from analysis.statistics.markdown import markdown_table  # noqa: E402
from dyvte.policies.base import Policy  # noqa: E402
from dyvte.policies.registry import methods  # noqa: E402

SECTION = "methods"
ACTS = {"exits": "all visual tokens leave at once", "thins": "some leave, some stay", "": "none leaves"}
CELL = 12
"""Side of a place of the image, in pixels."""
DARKEST, LIGHTEST = 26, 96
"""Lightness of a place that is never seen and of the one seen most, in percent."""


# ------------------------------------------------------------------------- what is known


@cache
def titles_of_papers() -> dict[str, str]:
    """ArXiv id -> title, of CITATION.cff."""
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())["references"]
    return {each["url"].rpartition("/")[2]: each["title"] for each in cited}


def kept_maps() -> dict[str, dict[str, Any]]:
    """Method -> what the gallery's run of `analysis.kept_positions` found; empty where it has not been run."""
    source = json.loads((ROOT / "docs/images/sources.json").read_text()).get("kept_positions.png")
    if source is None:
        return {}
    numbers = {
        key.rpartition(".")[2]: values for key, values in source["numbers"].items() if key.startswith("methods.")
    }
    rows = [dict(zip(numbers, each, strict=True)) for each in zip(*numbers.values(), strict=True)]
    return {row["method"]: {**row, "command": source["command"]} for row in rows}


def comparison_rows() -> dict[str, dict[str, Any]]:
    """Method -> its row of docs/comparison.md at half the FLOPs."""
    rows = json.loads((ROOT / "docs/comparison.json").read_text())["all_methods"]["rows"]
    return {row["method"]: row for row in rows if row["budget"] is not None}


# ------------------------------------------------------------------------------- pages


def idea_of(method: type[Policy]) -> str:
    """What its file and its class say before they list settings."""
    module = inspect.getdoc(inspect.getmodule(method)) or ""
    own = (inspect.getdoc(method) or "").partition("\nAttributes:")[0].partition("\nExample:")[0]
    alone = [each for each in methods().values() if each.__module__ == method.__module__] == [method]
    return "\n\n".join([*([module] if alone else []), own]).strip()


def facts_of(method: type[Policy]) -> list[tuple[str, str]]:
    """What stands on top."""
    paper, code = method.source.paper, method.source.code
    title = titles_of_papers().get(paper, "")
    link = (
        f"{title}, [arXiv {paper}](https://arxiv.org/abs/{paper})"
        if title
        else f"[{paper}](https://arxiv.org/abs/{paper})"
    )
    file = Path(inspect.getfile(method)).relative_to(ROOT).as_posix()
    facts = [
        ("paper", link if paper else "none: a baseline"),
        ("official code", f"[{code}](https://github.com/{code})" if code else ""),
        ("visual tokens", ACTS[method.acts]),
        ("needs", ", ".join(method.needs) or "nothing beside the model and the prompt"),
        ("our choice, unverified", method.source.unverified),
        ("file", f"[{file}](../../{file})"),
        ("reference", f"[dyvte.{method.__name__}](../reference.md#{method.__module__}.{method.__name__})"),
        ("settings", f"[conf/policy/{method.name}.yaml](../../conf/policy/{method.name}.yaml)"),
    ]
    return [(name, value) for name, value in facts if value]


def lightness(share: float) -> float:
    """Of a place, in percent."""
    return DARKEST + (LIGHTEST - DARKEST) * share


def places_svg(values: Sequence[Sequence[float]]) -> str:
    """The places of the image, darker where a place is seen less often; 1 is always."""
    top = max(map(max, values)) or 1.0
    size = f'width="{CELL}" height="{CELL}"'
    cells = "".join(
        f'<rect x="{CELL * x}" y="{CELL * y}" {size} fill="hsl(205 45% {lightness(value / top):.0f}%)"/>'
        for y, row in enumerate(values)
        for x, value in enumerate(row)
    )
    width, height = CELL * len(values[0]), CELL * len(values)
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}">{cells}</svg>'


def places_section(method: type[Policy], found: Mapping[str, Any]) -> list[str]:
    """Its picture of kept positions."""
    low, high = found["mean_place_ci"]
    return [
        "## Which places it keeps",
        "",
        f"![Places of the image that {method.label} keeps, lighter where more often]({method.name}.svg)",
        "",
        f"Lighter: a place of the image that more layers see, in more of the questions. It keeps {found['kept']:.0%} "
        f"of the tokens; their mean place is {found['mean_place']:.2f} [{low:.2f}, {high:.2f}], from 0 for the first "
        f"to 1 for the last: {found['preference']}.{'' if found['at_budget'] else ' At a cost of its own.'} From "
        f"`{found['command']}`.",
        "",
    ]


def result_section(row: Mapping[str, Any]) -> list[str]:
    """What it came to at half the FLOPs."""
    return [
        "## What it came to",
        "",
        f"At {row['cost']:.2f} of the decoder's FLOPs on the shipped model ({row['setting'] or 'one setting'}): "
        f"accuracy {row['accuracy']:.1%} [{row['accuracy_low']:.1%}, {row['accuracy_high']:.1%}], "
        f"{row['agreement']:.1%} of the full model's answers kept. All methods, and who can be told apart: "
        "[comparison](../comparison.md). The model is small and made to check the tool on; it is no evidence about "
        "larger ones.",
        "",
    ]


def method_page(method: type[Policy], maps: Mapping[str, Any], rows: Mapping[str, Any]) -> str:
    """The page of one method."""
    name = method.name
    lines = [f"# {method.label}", "", idea_of(method), ""]
    lines += [f"- **{fact}**: {value}" for fact, value in facts_of(method)]
    lines += ["", "```sh", f"python -m dyvte.evaluate policy={name}", "```", ""]
    if name in maps:
        lines += places_section(method, maps[name])
    if name in rows:
        lines += result_section(rows[name])
    settings = (ROOT / "conf/policy" / f"{name}.yaml").read_text().rstrip()
    return "\n".join([*lines, "## Settings", "", "```yaml", settings, "```", ""])


def index_page() -> str:
    """All methods in one table."""
    rows = [
        [f"[{each.label}]({name}.md)", ACTS[each.acts], ", ".join(each.needs) or "–", each.source.paper or "–"]
        for name, each in methods().items()
    ]
    table = markdown_table(["method", "visual tokens", "needs", "arXiv"], rows)
    words = "Every method that `policy=NAME` runs; how they work together: [policies](../policies.md)."
    return "\n".join(["# Methods", "", words, "", *table, ""])


# ------------------------------------------------------------------------------- hooks


def on_config(config: Any) -> Any:
    """Add the pages to the section of mkdocs.yml."""
    (section,) = (entry for entry in config.nav if "Methods" in entry)
    section["Methods"] = [
        f"{SECTION}/index.md",
        *({each.label: f"{SECTION}/{name}.md"} for name, each in methods().items()),
    ]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages and their pictures."""
    maps, rows = kept_maps(), comparison_rows()
    for name, method in methods().items():
        files.append(File.generated(config, f"{SECTION}/{name}.md", content=method_page(method, maps, rows)))
        if name in maps:
            files.append(File.generated(config, f"{SECTION}/{name}.svg", content=places_svg(maps[name]["map"])))
    files.append(File.generated(config, f"{SECTION}/index.md", content=index_page()))
    return files
