"""`python -m docs.tooling.comparison` (`make comparison`): README.md's comparison of all methods on the shipped model.

Runs `analysis.tables` on the shipped model, keeps the numbers that README.md shows in `docs/comparison.json` with
digests of the weights, and writes the part of README.md between its two comments from them. By these a test tells that
the numbers are those of the weights that ship, and that README.md shows them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from analysis.measuring.methods import LABELS
from analysis.measuring.shipped import shipped_files
from analysis.statistics.markdown import markdown_table, percent_with_limits, replace_between
from analysis.statistics.methods import sentence, what_it_means
from analysis.tables import tables
from docs.tooling.gallery import rounded
from dyvte.errors import DyvteError
from dyvte.runs.config import compose
from dyvte.runs.store import plain, write_atomic, write_json

RECORD, README = Path("docs/comparison.json"), Path("README.md")
START, END = "<!-- comparison -->", "<!-- /comparison -->"
KEPT = ("model", "data", "num_samples", "num_images", "needs_image", "tolerance", "rows", "verdicts")
SUBSETS = {"accuracy": "all", "accuracy_needs_image": "image needed"}


def run_folder() -> Path:
    """Where the runs lie: a folder for the weights and gates that ship."""
    digests = shipped_files()
    return Path("outputs/comparison") / f"{digests['weights']}-{digests['gates']}"


def record(summary: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of the summary of `analysis.tables`."""
    kept: dict[str, Any] = rounded(plain({key: summary[key] for key in KEPT}))
    return {**shipped_files(), **kept}


def section(found: Mapping[str, Any]) -> str:
    """The comparison as Markdown, from what `record` keeps."""
    tolerance, verdicts = found["tolerance"], found["verdicts"]
    methods = {row["method"]: row for row in found["rows"]}
    rows = {(row["method"], row["budget"]): row for row in found["rows"]}
    budgets = list(dict.fromkeys(row["budget"] for row in found["rows"] if row["budget"] is not None))
    leading = {
        (each["on"], each["budget"], method) for each in verdicts for method in (each["ahead"], *each["not_told_apart"])
    }

    def cell(method: str, subset: str, budget: float) -> str:
        row = rows.get((method, budget))
        if row is None or row[subset] is None:
            return "–"
        text = percent_with_limits(row, subset)
        if (subset, budget, method) in leading:
            return f"**{text}**"
        return text if abs(row["cost"] - budget) <= tolerance else f"{text} (at {row['cost']:.2f})"

    head = ["method", *(f"{budget:g}, {name}" for name in SUBSETS.values() for budget in budgets)]
    body = [
        [LABELS[method], *(cell(method, subset, budget) for subset in SUBSETS for budget in budgets)]
        for method in methods
        if method != "none"
    ]
    lines = [
        f"Accuracy in percent on {found['num_samples']} questions about {found['num_images']} images, "
        f"{found['needs_image']} of which the model answers otherwise without their image (*image needed*). In each "
        "column all methods are set to the same decoder FLOPs of the prefill, as a share of the full model's. In "
        "brackets: 95% intervals (bootstrap over images). Bold: the most accurate, and what is not told apart from it.",
        "",
        *markdown_table(head, body),
    ]
    if (full := methods.get("none")) is not None:
        parts = [f"{percent_with_limits(full, subset)} ({name})" for subset, name in SUBSETS.items()]
        lines += ["", f"The full model: {', '.join(parts)}."]
    if several := [row for row in found["rows"] if row["seeds"] > 1]:
        fewest = min(row["seeds"] for row in several)
        spread = max(row["best_seed"] - row["worst_seed"] for row in several)
        lines[-1] += f" Random dropping is the mean of {fewest} draws, which are up to {100 * spread:.1f} points apart."
    lines += ["", *(sentence(each, tolerance) for each in verdicts), "", what_it_means(verdicts, tolerance)]
    return "\n".join(lines)


def write(found: Mapping[str, Any], file: Path, readme: Path) -> None:
    """Keep the numbers, and show them in README.md; a file without the two comments stays as it is."""
    write_json(file, found)
    text = replace_between(readme.read_text(), START, END, section(found))
    write_atomic(readme, lambda out: out.write(text.encode()))


def comparison(settings: Sequence[str] = (), file: Path = RECORD, readme: Path = README) -> None:
    """Finish the runs and write the page; several processes share the runs, the first writes."""
    summary = tables(compose("tables", [f"output_dir={run_folder()}", *settings]))
    if summary is not None:
        write(record(summary), file, readme)
        print(f"written to {readme} and {file}")


def main() -> None:
    """Compare. An ordinary function calls the command: within Hydra's it could not be composed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", help="key=value, see conf/tables.yaml")
    parser.add_argument("--record", type=Path, default=RECORD, help="file of the numbers")
    parser.add_argument("--readme", type=Path, default=README, help="file that shows them")
    given = parser.parse_args()
    try:
        comparison(given.settings, given.record, given.readme)
    except DyvteError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
