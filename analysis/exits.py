"""Visual-token exit at every layer, from one pass: `python -m analysis.exits`.

For every exit layer k: accuracy, agreement with the full model, KL divergence, remaining FLOPs and text self-attention
entropy; K* of the KL criterion; exit depths; and which of the paper's findings hold (`docs/exits.md`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import pandas as pd
from matplotlib import pyplot as plt
from omegaconf import DictConfig

from dyvte.data import Dataset
from dyvte.errors import ConfigError
from dyvte.mllm import MLLM
from dyvte.runs import store
from dyvte.runs.config import command, load_model

from .measuring.exits import measurement, questions_and_captions
from .measuring.runs import finish_run, measure_dataset, run_facts
from .plots import exits as plots
from .statistics import exits as exit_statistics
from .statistics.bands import LEVEL, bands_to_dict, cluster_mean
from .statistics.entropy import entropy_change
from .statistics.exit_summary import (
    CAPTIONS,
    EXIT_MEASURES,
    FLOPS,
    QUESTIONS,
    ExitResults,
    QuestionGroup,
    entropy_mean_table,
    entropy_summary,
    exit_curves_table,
    token_curves,
    token_depths,
    token_summary,
)
from .statistics.needs_image import needs_image
from .statistics.verdicts import image_use_in_words


@command("exits")
def main(cfg: DictConfig) -> str | None:
    """Measure, summarise and draw; continues where an earlier run of the same command was stopped."""
    dataset = questions_and_captions(cfg)
    summary = run(cfg, load_model(cfg), dataset)
    return " ".join(image_use_in_words(summary)) if summary else None


def run(cfg: DictConfig, mllm: MLLM, dataset: Dataset) -> dict[str, Any] | None:
    """The command with a model and data that are loaded already; None in processes other than the main one."""
    measure = measurement(mllm, dataset, cfg)
    settings = {"max_new_tokens": cfg.max_new_tokens, "accuracy": cfg.accuracy}
    folder = measure_dataset(cfg, mllm, dataset, measure, **settings)
    return None if folder is None else report(cfg, folder, mllm)


def outline(summary: Mapping[str, Any]) -> str:
    """The findings and the main table, for the terminal."""
    lines = ["exit layer  accuracy  agreement        KL  decoder FLOPs"]
    full = summary["flops_decoder"][-1]
    for k, agreement in enumerate(summary["agreement"]):
        accuracy = "       -" if summary["accuracy"][k] is None else f"{summary['accuracy'][k]:8.3f}"
        share = summary["flops_decoder"][k] / full
        lines.append(f"{k:10d}  {accuracy}  {agreement:9.3f}  {summary['kl'][k]:8.2g}  {share:13.0%}")
    k_star = ", ".join(f"{eta}: {layer}" for eta, layer in summary["k_star"].items())
    lines.append(f"K* (first exit with KL at most eta): {k_star}")
    for finding in summary["findings"].values():
        lines.append(f"{finding['verdict'].replace('_', ' ')}: {finding['statement']}")
        lines += [f"  {reason}" for reason in finding["reasons"]]
    return "\n".join(lines)


def report(cfg: DictConfig, folder: store.RunFolder, mllm: MLLM) -> dict[str, Any]:
    """Everything that follows from the tables: curves, K*, findings, figures, summary."""
    everything = ExitResults.read(folder, cfg.bootstrap, cfg.seed)
    asks = (everything.samples["part"] == QUESTIONS).to_numpy() & (everything.samples["visual_tokens"] > 0).to_numpy()
    if not asks.any():
        raise ConfigError(
            f"no question of data={cfg.data.name} has an image: there are no visual tokens that could exit"
        )
    results = everything.where(asks)
    overall = QuestionGroup.of(results, cfg)
    groups = {"all": overall}
    needed, said_by = needs_image(
        [None if pd.isna(each) else int(each) for each in results.samples.get("hops", [None])],
        results.samples["needs_image"].fillna(False).to_numpy(bool),
    )
    if needed.any():
        groups["needs_image"] = QuestionGroup.of(results.where(needed), cfg)
    kinds = results.samples["kind"].astype(str).to_numpy()
    # Many kinds are many chances of a false finding: Bonferroni.
    level = 1 - (1 - LEVEL) / len(set(kinds))
    for kind in sorted(set(kinds)):
        groups[f"kind={kind}"] = QuestionGroup.of(results.where(kinds == kind), cfg, level)

    entropies = results.entropies["text_entropy"], results.swapped_entropy
    findings = {
        "contribution_stops": overall.stops,
        "early_exit_disturbs_text_entropy": exit_statistics.early_exit_disturbs(
            *entropies, overall.stops.exit_layer, results.bootstrap
        ),
        "exit_depth_depends_on_kind": exit_statistics.depth_depends_on_kind(
            results.samples["exit_depth"].to_numpy(float),
            kinds,
            results.bootstrap.images,
            overall.stops.details.get("contributes", False),
            cfg.permutations,
            cfg.seed,
        ),
    }
    kl_exits = exit_statistics.kl_exits(results.exits["kl"], results.bootstrap, list(cfg.etas), cfg.kl_start)
    entropy = entropy_summary(results)
    of_tokens = folder.read_table("tokens").merge(
        everything.samples[["id", "part", "image_id"]], on="id", how="left", validate="many_to_one"
    )
    folder.write_table("curves", exit_curves_table(groups))
    folder.write_table("entropy_mean", entropy_mean_table(entropy))
    folder.write_table("token_curves", token_curves(of_tokens))
    summaries = {name: group.summary() for name, group in groups.items()}
    content = {
        **run_facts(cfg, mllm),
        "num_questions": len(results.samples),
        "num_images": results.bootstrap.num_images,
        "num_captions": int((everything.samples["part"] == CAPTIONS).sum()),
        "num_without_image": int((everything.samples["visual_tokens"] == 0).sum()),
        **{name: overall.curves[name].mean for name in EXIT_MEASURES},
        **{name: cluster_mean(results.exits[name]) for name in FLOPS},
        "k_star": {f"{each.eta:g}": each.layer for each in kl_exits},
        "k_star_details": [asdict(each) for each in kl_exits],
        "kl_start": cfg.kl_start,
        "findings": {name: asdict(finding) for name, finding in findings.items()},
        "overall": summaries.pop("all"),
        "needs_image": summaries.pop("needs_image", None),
        "needs_image_by": said_by,
        "kinds": {name.removeprefix("kind="): group for name, group in summaries.items()},
        "entropy": entropy,
        "entropy_change": bands_to_dict(entropy_change(*entropies, results.exits["agree"], results.bootstrap)),
        "tokens": token_summary(token_depths(of_tokens), cfg),
        "settings": {"level": LEVEL, "bootstrap": cfg.bootstrap, "permutations": cfg.permutations, **cfg.findings},
    }
    return finish_run(folder, content, draw, outline)


def draw(summary: Mapping[str, Any]) -> dict[str, plt.Figure]:
    """All figures, by file name, from what `summary.json` will say."""
    figures = {
        "exits": plots.draw_exit_curves(summary),
        "kl": plots.draw_kl(summary),
        "entropy": plots.draw_text_entropy(summary),
        "entropy_change": plots.draw_entropy_change(summary),
        "exit_depth": plots.draw_exit_depths(summary),
    }
    if len(summary["kinds"]) > 1:
        figures["kinds"] = plots.draw_exit_curves_by_kind(summary)
    if {QUESTIONS, CAPTIONS} <= summary["tokens"].keys():
        figures["tokens"] = plots.draw_token_depths(summary)
    return figures


if __name__ == "__main__":
    main()
