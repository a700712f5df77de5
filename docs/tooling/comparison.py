"""`python -m docs.tooling.comparison` (`make comparison`): docs/comparison.md, all methods at one cost.

Runs `analysis.tables` on the shipped model in the two forms that papers use, equal FLOPs and an equal number of visual
tokens, keeps the numbers that the page shows in `docs/comparison.json`, and writes a part of the page of each.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from analysis.measuring.runs import shipped_files
from analysis.statistics.markdown import markdown_table, percent_with_limits
from analysis.statistics.methods import sentence, what_it_means
from analysis.statistics.needs_image import in_words
from analysis.tables import tables
from docs.tooling.gallery import rounded
from docs.tooling.generated import write_generated
from dyvte.errors import DyvteError
from dyvte.policies.registry import labels, methods
from dyvte.runs.config import compose
from dyvte.runs.store import plain, write_json

RECORD, PAGE = Path("docs/comparison.json"), Path("docs/comparison.md")
FORMS = {"comparison": "all_methods", "comparison_tokens": "llava15_128tokens"}
"""The parts of the page, with the experiment of each."""
SPENT = {"flops": ("decoder FLOPs of the prefill", "cost"), "tokens": ("visual tokens a decoder layer sees", "tokens")}
"""What is held equal, and its column, by `dyvte.policies.method.Counted`."""
QUESTIONS = 2000
KEPT = (
    *("experiment", "counted", "model", "data", "num_samples", "num_images"),
    *("needs_image", "needs_image_by", "tolerance", "rows", "verdicts"),
)
SUBSETS = {"accuracy": "all", "accuracy_needs_image": "image needed"}


def run_folder(experiment: str) -> Path:
    """Where the runs of an experiment lie: a folder for the weights and gates that ship."""
    digests = shipped_files()
    return Path("outputs/comparison") / f"{digests['weights']}-{digests['gates']}" / experiment


def record(summary: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of the summary of `analysis.tables`."""
    kept: dict[str, Any] = rounded(plain({key: summary[key] for key in KEPT}))
    return kept


def comparison_section(found: Mapping[str, Any]) -> str:
    """One form of the comparison as Markdown, from what `record` keeps; the most accurate method comes first."""
    tolerance, verdicts, (held_equal, column) = found["tolerance"], found["verdicts"], SPENT[found["counted"]]
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
        return text if abs(row[column] - budget) <= tolerance else f"{text} (at {row[column]:.2f})"

    def deciding(method: str) -> str:
        spent = [row["deciding"] for (name, _), row in rows.items() if name == method and "deciding" in row]
        return f"{max(spent):.3f}" if spent else "–"

    def reached(method: str) -> float:
        row = rows.get((method, budgets[-1]))
        return 0.0 if row is None else row["accuracy_needs_image"] or 0.0

    names = sorted({name: None for name, _ in rows if name != "none"}, key=reached, reverse=True)
    head = ["method", *(f"{budget:g}, {name}" for name in SUBSETS.values() for budget in budgets), "+ deciding"]
    body = [
        [
            labels()[name] + ("\\*" if methods()[name].source.unverified else ""),
            *(cell(name, subset, budget) for subset in SUBSETS for budget in budgets),
            deciding(name),
        ]
        for name in names
    ]
    lines = [
        f"Accuracy in percent on {found['num_samples']:,} questions about {found['num_images']:,} images, "
        f"{found['needs_image']:,} of which {in_words(found['needs_image_by'])} (*image needed*). In each "
        f"column all methods are set to the same {held_equal}, as a share of the full model's. In brackets: 95% "
        "intervals, clustered by image. Bold: the most accurate, and what is not told apart from it. Deciding is what "
        "choosing tokens or layers takes on top, as a share of the full model's decoder FLOPs. \\*: some details are "
        "our choice, as neither paper nor code was at hand for them.",
        "",
        *markdown_table(head, body),
    ]
    if (full := rows.get(("none", None))) is not None:
        parts = [f"{percent_with_limits(full, subset)} ({name})" for subset, name in SUBSETS.items()]
        lines += ["", f"The full model: {', '.join(parts)}."]
    if several := [row for row in found["rows"] if row["seeds"] > 1]:
        fewest = min(row["seeds"] for row in several)
        spread = max(row["best_seed"] - row["worst_seed"] for row in several)
        lines[-1] += f" Random dropping is the mean of {fewest} draws, which are up to {100 * spread:.1f} points apart."
    lines += ["", *(sentence(each, tolerance) for each in verdicts), "", what_it_means(verdicts, tolerance)]
    return "\n".join(lines)


def publish(found: Mapping[str, Mapping[str, Any]], file: Path = RECORD, page: Path = PAGE) -> None:
    """Keep the numbers of every experiment, and show them on the page."""
    write_json(file, found)
    for section, experiment in FORMS.items():
        if experiment in found:
            text = comparison_section(found[experiment])
            write_generated(page, text, "make comparison", ("weights", "gates"), section)


def main() -> None:
    """Finish the runs and write the page; several processes share the runs, the first writes.

    An ordinary function calls the command: within Hydra's it could not be composed.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", help="key=value, see conf/tables.yaml")
    given: Sequence[str] = parser.parse_args().settings
    found = {}
    for experiment in FORMS.values():
        own = [f"experiment={experiment}", f"output_dir={run_folder(experiment)}", f"data.limit={QUESTIONS}"]
        try:
            summary = tables(compose("tables", [*own, *given]))
        except DyvteError as error:
            sys.exit(f"error: {error}")
        if summary is not None:
            found[experiment] = record(summary)
    if found:
        publish(found)
        print(f"written to {PAGE} and {RECORD}")


if __name__ == "__main__":
    main()
