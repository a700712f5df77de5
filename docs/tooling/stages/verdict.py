"""Write docs/stage_verdict.md from runs of the shipped model: `python -m docs.tooling.stages.verdict`.

Reads `analysis.stages`, `analysis.knockout` and `analysis.stage_table` run folders; nothing is judged here.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from analysis.measuring.runs import read_summary
from analysis.stage_table import page
from analysis.statistics.markdown import markdown_table
from analysis.statistics.segments import THREE_STAGE_FITS
from analysis.statistics.verdicts import verdict_word
from docs.tooling.generated import fill, write_generated

COMMAND = "python -m docs.tooling.stages.verdict"
MEASURES = {"stages": "enrichment without the sink", "stages_by_mass": "raw attention mass"}


def limits(triple: Sequence[float]) -> str:
    """Estimate with its one-sided limits."""
    return f"{triple[0]:+.2f} [{triple[1]:+.2f}, {triple[2]:+.2f}]"


def claims_table(summary: Mapping[str, Any]) -> str:
    """Claims 1 and 2 and the numbers behind them, a column a measure."""
    found = [summary[key] for key in MEASURES]

    def row(label: str, values: Sequence[Any]) -> list[str]:
        return [label, *map(str, values)]

    def contrast(of: str, name: str) -> list[str]:
        return ["-" if each[of][name] is None else limits(each[of][name]) for each in found]

    rows = [
        row("verdict", [verdict_word(each["verdict"]) for each in found]),
        *(
            row(label, [verdict_word(each["claims"][claim]) for each in found])
            for claim, label in (
                ("valley", "1. valley"),
                ("shape", "2. stages, not a bend"),
                ("visual_peak", "stage 2 by visual to visual"),
            )
        ),
        row("BIC gain of three stages", [f"{each['bic_gain']:+.1f}" for each in found]),
        row("best rival", [each["rival"].replace("_", " ") for each in found]),
        row(
            "posterior weight of three stages",
            [f"{sum(each['weights'][name] for name in THREE_STAGE_FITS):.2f}" for each in found],
        ),
        row("questions whose own curve falls and rises", [f"{each['prevalence']:.0%}" for each in found]),
    ]
    for of, label in (("contrasts", "split that fits best"), ("registered", "registered split")):
        rows.append(row(label, [tuple(each[of]["split"]) for each in found]))
        rows += [
            row(f"{label}: {name.replace('_', ' ')}", contrast(of, name))
            for name in ("fall", "rise", "visual_in", "visual_out")
        ]
    return "\n".join(markdown_table(["", *MEASURES.values()], rows))


def what_holds(rows: Sequence[Mapping[str, Any]]) -> str:
    """Which stages hold by attention, which by cause, and where the two disagree, split by split."""
    lines = []
    for split in dict.fromkeys(row["split"] for row in rows):
        of_split = [row for row in rows if row["split"] == split]
        parts = [f"{row['stage']} {_by_attention(row)}, {_by_cause(row)}{_disagreement(row)}" for row in of_split]
        lines.append(f"At the split {split}: {'; '.join(parts)}.")
    return "\n\n".join(lines)


def _by_attention(row: Mapping[str, Any]) -> str:
    word = verdict_word(row["by_attention"])
    return word if word.endswith("by attention") else f"{word} by attention"


def _by_cause(row: Mapping[str, Any]) -> str:
    return f"{verdict_word(row['by_cause'])} by cause"


def _disagreement(row: Mapping[str, Any]) -> str:
    return " (**they disagree**)" if {row["by_attention"], row["by_cause"]} == {"confirmed", "refuted"} else ""


def main() -> None:
    """Read the runs, write the page and its pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("stages", "stage_table"):
        parser.add_argument(f"--{name.replace('_', '-')}", default=f"outputs/{name}/llava_shapes/shapes")
    options = parser.parse_args()
    stages, table = read_summary(options.stages), read_summary(options.stage_table)
    values = {
        "model": stages["model"],
        "layers": stages["num_layers"],
        "samples": stages["num_samples"],
        "images": stages["num_images"],
        "claims": claims_table(stages),
        "table": "\n".join(page(table)[2:]),
        "what_holds": what_holds(table["rows"]),
    }
    for folder, name in ((options.stages, "stages"), (options.stage_table, "stage_table")):
        picture = (Path(folder) / "figures" / f"{name}.png").read_bytes()
        write_generated(f"docs/stages/{name}.png", picture, COMMAND, made_from=["weights"])
    write_generated("docs/stage_verdict.md", fill("stage_verdict", values), COMMAND, made_from=["weights"])


if __name__ == "__main__":
    main()
