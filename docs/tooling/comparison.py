"""`python -m docs.tooling.comparison` (`make comparison`): docs/comparison.md, all methods at one cost.

Runs `analysis.tables` on the shipped model, keeps the numbers that the page shows in `docs/comparison.json`, and writes
the part of the page between its two comments from them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from analysis.measuring.shipped import shipped_files
from analysis.statistics.markdown import markdown_table, percent_with_limits
from analysis.statistics.methods import sentence, what_it_means
from analysis.statistics.needs_image import in_words
from analysis.tables import tables
from docs.tooling.gallery import rounded
from docs.tooling.generated import write_generated
from dyvte.errors import DyvteError
from dyvte.policies.registry import labels
from dyvte.runs.config import compose
from dyvte.runs.store import plain, write_json

RECORD, PAGE = Path("docs/comparison.json"), Path("docs/comparison.md")
SECTION = "comparison"
KEPT = ("model", "data", "num_samples", "num_images", "needs_image", "needs_image_by", "tolerance", "rows", "verdicts")
SUBSETS = {"accuracy": "all", "accuracy_needs_image": "image needed"}


def run_folder() -> Path:
    """Where the runs lie: a folder for the weights and gates that ship."""
    digests = shipped_files()
    return Path("outputs/comparison") / f"{digests['weights']}-{digests['gates']}"


def record(summary: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of the summary of `analysis.tables`."""
    kept: dict[str, Any] = rounded(plain({key: summary[key] for key in KEPT}))
    return kept


def comparison_section(found: Mapping[str, Any]) -> str:
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
        [labels()[method], *(cell(method, subset, budget) for subset in SUBSETS for budget in budgets)]
        for method in methods
        if method != "none"
    ]
    lines = [
        f"Accuracy in percent on {found['num_samples']} questions about {found['num_images']} images, "
        f"{found['needs_image']} of which {in_words(found['needs_image_by'])} (*image needed*). In each "
        "column all methods are set to the same decoder FLOPs of the prefill, as a share of the full model's. In "
        "brackets: 95% intervals, clustered by image. Bold: the most accurate, and what is not told apart from it.",
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


def publish(found: Mapping[str, Any], file: Path = RECORD, page: Path = PAGE) -> None:
    """Keep the numbers, and show them on the page."""
    write_json(file, found)
    write_generated(page, comparison_section(found), "make comparison", ("weights", "gates"), SECTION)


def main() -> None:
    """Finish the runs and write the page; several processes share the runs, the first writes.

    An ordinary function calls the command: within Hydra's it could not be composed.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", help="key=value, see conf/tables.yaml")
    given: Sequence[str] = parser.parse_args().settings
    try:
        summary = tables(compose("tables", [f"output_dir={run_folder()}", *given]))
    except DyvteError as error:
        sys.exit(f"error: {error}")
    if summary is not None:
        publish(record(summary))
        print(f"written to {PAGE} and {RECORD}")


if __name__ == "__main__":
    main()
