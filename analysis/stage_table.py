"""Which of the three stages hold by attention and which by cause: `python -m analysis.stage_table`.

Joins a run of `analysis.stages` and one of `analysis.knockout` by rules that were fixed beforehand
(`docs/stage_rules.md`), and judges a recipe where runs of several seeds are given. No model is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import DictConfig

from dyvte.errors import ConfigError
from dyvte.runs import store
from dyvte.runs.config import command

from .knockout import counted_samples
from .measuring.runs import read_summary
from .plots.causal import draw_stage_table
from .statistics.bands import count_images
from .statistics.markdown import markdown_table, write_table_page
from .statistics.segments import registered_split
from .statistics.stage_table import LEVEL, StageEvidence, attention_stages, causal_stages, losses_of, stage_rows
from .statistics.stages import recipe_verdict
from .statistics.verdicts import stages_held_in_words, verdict_word

SHARED = ("model", "data", "num_layers")


@command("stage_table")
def main(cfg: DictConfig) -> str:
    """Join, judge, write."""
    return stages_held_in_words(make_stage_table(cfg)["rows"])


def make_stage_table(cfg: DictConfig) -> dict[str, Any]:
    """The command; returns its summary."""
    stages, knockout = read_summary(cfg.stages), read_summary(cfg.knockout)
    for key in SHARED:
        if stages[key] != knockout[key]:
            raise ConfigError(f"{key} is {stages[key]} in {cfg.stages} and {knockout[key]} in {cfg.knockout}")
    folder = store.RunFolder(Path(cfg.knockout))
    ids, images = counted_samples(folder, knockout["only_right"])[["id", "image_id"]].to_numpy().T
    cuts = folder.read_table("stage_cuts")
    evidence = {}
    judged = known_splits(stages["stages"], stages["num_layers"])
    for split, contrasts in judged.items():
        if list(split) in knockout["splits"]:
            losses = losses_of(cuts, split, knockout["num_layers"], ids)
            evidence[split] = (attention_stages(contrasts), causal_stages(losses, split, images))
    if not evidence:
        asked = ",".join(f"[{first},{second}]" for first, second in judged)
        raise ConfigError(
            f"{cfg.knockout} has cut the splits {knockout['splits']}, and {cfg.stages} has judged others: run "
            f"python -m analysis.knockout 'splits=[{asked}]' overwrite=true"
        )
    rows = [row for split, both in evidence.items() for row in stage_rows(split, stages["num_layers"], *both)]
    summary = store.plain(
        {
            **{key: stages[key] for key in SHARED},
            "attention": {key: stages[key] for key in ("num_samples", "num_images")},
            "cause": {"num_samples": len(ids), "num_images": count_images(images), "level": LEVEL},
            "verdict": stages["stages"]["verdict"],
            "rows": rows,
            "evidence": [
                {"split": list(split), "attention": list(map(asdict, attention)), "cause": list(map(asdict, cause))}
                for split, (attention, cause) in evidence.items()
            ],
            "recipe": asdict(recipe_verdict([read_summary(each)["stages"] for each in cfg.seed_runs]))
            if cfg.seed_runs
            else None,
            "versions": store.versions(),
        }
    )
    out = store.RunFolder(Path(cfg.output_dir))
    out.path.mkdir(parents=True, exist_ok=True)
    out.write_table("stage_table", pd.DataFrame(rows))
    out.write_table("numbers", numbers_table(evidence))
    out.save_figure("stage_table", draw_stage_table(summary))
    write_table_page(out, page(summary))
    store.write_json(out.path / "summary.json", {**summary, "figures": ["stage_table"]})
    return dict(summary)


def known_splits(stages: Mapping[str, Any], num_layers: int) -> dict[tuple[int, int], dict[str, Any] | None]:
    """The registered split and, where three stages were found, their boundaries; with what attention does there.

    None where the run had too few layers or images to say.
    """
    found: dict[tuple[int, int], dict[str, Any] | None] = {registered_split(num_layers): stages["registered"]}
    if stages["boundaries"]:
        found[tuple(stages["boundaries"])] = stages["contrasts"]
    return found


def numbers_table(evidence: dict[tuple[int, int], tuple[list[StageEvidence], list[StageEvidence]]]) -> pd.DataFrame:
    """Every number behind the table, one row each."""
    rows = [
        (*split, each.stage, kind, name, *limits)
        for split, both in evidence.items()
        for kind, of_kind in zip(("attention", "cause"), both, strict=True)
        for each in of_kind
        for name, limits in each.numbers.items()
    ]
    columns = ["first_boundary", "second_boundary", "stage", "evidence", "number", "estimate", "low", "high"]
    return pd.DataFrame(rows, columns=columns)


def page(summary: dict[str, Any]) -> list[str]:
    """The table in Markdown, with what its numbers are of."""
    head = ["split", "stage", "layers", "by attention", "by cause", "attention (log enrichment)", "cause (points)"]
    rows = [
        [
            *(row["split"], row["stage"], f"{row['first_layer']}-{row['last_layer']}"),
            verdict_word(row["by_attention"]),
            verdict_word(row["by_cause"]) + (f" ({row['note']})" if row["note"] else ""),
            *(row["attention_numbers"], row["cause_numbers"]),
        ]
        for row in summary["rows"]
    ]
    attention, cause = summary["attention"], summary["cause"]
    lines = [
        f"### Stages of {summary['model']} on {summary['data']}, by attention and by cause",
        "",
        *markdown_table(head, rows),
        "",
        f"Attention: {attention['num_samples']:,} questions on {attention['num_images']:,} images, one-sided 95% "
        f"limits for all splits together. Cause: {cause['num_samples']:,} questions on {cause['num_images']:,} images, "
        f"answers changed in percentage points, one-sided {100 * cause['level']:.1f}% limits.",
    ]
    if (recipe := summary["recipe"]) is not None:
        levels, stages = verdict_word(recipe["levels"]), verdict_word(recipe["stages"])
        lines += [
            "",
            f"Recipe, {recipe['num_runs']} runs: levels {levels}; stages {stages} ({recipe['num_three_stage']} runs).",
        ]
    return lines


if __name__ == "__main__":
    main()
