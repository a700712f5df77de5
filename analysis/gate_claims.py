"""`python -m analysis.gate_claims`: do gates read the state of the text, or the question? Four tests, and their page.

The tests and their decision rules were registered in docs/hypotheses_gates.md before any was run. The label set that
they need is made once, whatever the gates; a pass that was killed goes on.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from dyvte.data.base import build_dataset
from dyvte.errors import ConfigError
from dyvte.gates.labels import LabelSet
from dyvte.gates.metrics import mixture_cost
from dyvte.gates.module import Gates, load_gates
from dyvte.runs import distributed
from dyvte.runs.config import command, load_model
from dyvte.runs.store import RunFolder, fingerprint, plain, write_atomic, write_json

from .measuring.gate_claims import all_seeing_frontier, claim_figures, claim_labels
from .measuring.runs import run_facts, shipped_files
from .statistics.markdown import markdown_table, with_limits

MAX_COST_RATIO, MIN_ORACLE_SHARE = 0.85, 0.6
MIN_AGREEMENT, MAX_LOSS = 0.985, 0.01
"""Asked of better gates, as registered."""


@command("gate_claims")
def main(cfg: DictConfig) -> str | None:
    """Test the gates that `conf/gate_claims.yaml` names."""
    mllm, dataset = load_model(cfg), build_dataset(cfg.data)
    if not cfg.gates:
        raise ConfigError("gates is empty: name a shipped model, a folder of python -m dyvte.train, or a Hub id")
    tested = {str(source): load_gates(source) for source in cfg.gates}
    for gates in tested.values():
        gates.check(mllm)
    labels = claim_labels(mllm, dataset, cfg)
    training = None if cfg.bound_labels is None else LabelSet(RunFolder(Path(cfg.bound_labels)))
    settings = {"gates": list(tested), "folds": cfg.folds, "bootstrap": cfg.bootstrap}
    settings["bound"] = None if training is None else len(training)
    folder = RunFolder.open(cfg.output_dir, fingerprint(mllm, dataset, cfg, **settings), cfg, overwrite=True)
    if not distributed.is_main():
        return None
    found = findings(cfg, labels, tested)
    if training is not None:
        found["bound"] = {"questions": len(training), "frontier": all_seeing_frontier(training, labels)}
    folder.write_summary(
        **run_facts(cfg, mllm),
        num_samples=len(labels),
        num_failed=len(labels.folder.failures()),
        seconds=labels.folder.seconds,
        **found,
    )
    text = page(found)
    if cfg.page is not None:
        write_json(Path(cfg.page).with_suffix(".json"), found)
        write_atomic(Path(cfg.page), lambda out: out.write(text.encode()))
    print(text)
    print(f"run: {folder.path}")
    told = {name: conclusion(tests).replace("**", "") for name, tests in found["tests"].items()}
    return " ".join(f"{name}: {words}" for name, words in told.items())


def findings(cfg: DictConfig, labels: LabelSet, tested: Mapping[str, Gates]) -> dict[str, Any]:
    """Every number of the page, JSON types only.

    `trained_on` says what runs with less of the image, or another one, gates were trained on, as they say themselves.
    """
    found = {
        **shipped_files(),
        "asked": {key: cfg.data[key] for key in ("name", "split", "limit", "seed")},
        "questions": len(labels),
        "images": labels.samples["image_id"].nunique(),
        "texts": labels.samples["question"].nunique(),
        "layers": labels.num_layers,
        "tests": {
            name: claim_figures(gates, labels, cfg.folds, cfg.bootstrap, cfg.seed)
            | {"trained_on": list(gates.facts.get("recipe", {}).get("counterfactual", []))}
            for name, gates in tested.items()
        },
    }
    return dict(plain(found))


def page(found: Mapping[str, Any]) -> str:
    """The whole page."""
    lines = [
        "# What gates read: four registered tests",
        "",
        "`python -m analysis.gate_claims page=docs/gate_claims.md` wrote this page. The tests, their data and their "
        "decision rules: [hypotheses_gates.md](hypotheses_gates.md), fixed before any was run.",
        "",
        f"{found['questions']:,} questions that need the image, {found['texts']} texts, {found['images']:,} images "
        f"(`data={found['asked']['name']}`, seed {found['asked']['seed']}); weights `{found['weights']}`, shipped "
        f"gates `{found['gates']}`. Brackets hold 95% intervals, clustered by image.",
    ]
    for name, tests in found["tests"].items():
        lines += ["", f"## Gates `{name}`", "", *_tests(tests), "", conclusion(tests)]
        lines += ["", "### Within a text, by kind", "", *_kinds(tests["within_text"])]
        lines += ["", "### Less of the image", "", *_doses(tests)]
        lines += ["", "### Cost, and what was asked", "", *_asked(tests["cost"])]
        if "bound" in found:
            lines += ["", *_bound(tests["cost"], found["bound"])]
    return "\n".join(lines) + "\n"


def conclusion(tests: Mapping[str, Any]) -> str:
    """What the tests together say, by the registered rules."""
    verdicts = {name: tests[name]["verdict"] for name in ("within_text", "withheld", "dose")}
    if verdicts["within_text"] != "confirmed":
        reads = "These gates **read the question**: within one text they do not rank the images."
    elif all(each == "confirmed" for each in verdicts.values()):
        reads = "These gates **read the state of the text**: tests 1, 2 and 3 are confirmed."
    else:
        failed = [number for number, name in enumerate(verdicts, 1) if verdicts[name] != "confirmed"]
        reads = (
            "These gates know more than the question (test 1), but do not wait for the image: "
            f"test{'s' if len(failed) > 1 else ''} {' and '.join(map(str, failed))} not confirmed."
        )
    worth = {
        "confirmed": "They **are worth more than knowing the question** (4b).",
        "refuted": "They cost more than constants that know the question (4b).",
        "undetermined": "That they are worth more than knowing the question is undetermined (4b).",
    }[tests["cost"]["text"]["verdict"]]
    if not tests["trained_on"]:
        return f"{reads} {worth}"
    return (
        f"{reads} {worth} They were trained on statuses of other runs ({', '.join(tests['trained_on'])}), so tests 2 "
        "and 3 say that the training worked on fresh questions; only 1 and 4 are evidence for the claim."
    )


def _tests(tests: Mapping[str, Any]) -> list[str]:
    within, withheld, dose, cost = (tests[name] for name in ("within_text", "withheld", "dose", "cost"))
    of_kind, of_text = cost["kind"], cost["text"]
    rows = [
        ("1", "AUC within a text", with_limits(within), "above .5", within),
        ("2", "p(exit), image withheld less seen", with_limits(withheld, "+.3f"), "below 0", withheld),
        ("3", "slope of p(exit) per layer that saw the image", with_limits(dose, "+.4f"), "above 0", dose),
        ("4a", "cost over constants of the kind", with_limits(of_kind["ratio"]), "below 1", of_kind),
        ("4b", "cost over constants of the text", with_limits(of_text["ratio"]), "below 1", of_text),
    ]
    cells = [(*texts, f"**{test['verdict']}**") for *texts, test in rows]
    return markdown_table(["test", "statistic", "found", "claimed", "verdict"], cells)


def _kinds(within: Mapping[str, Any]) -> list[str]:
    rows = [
        [kind, each["texts"], f"{each['pairs']:,}", with_limits(each) if each["pairs"] else "–"]
        for kind, each in within["kinds"].items()
    ]
    gates = ", ".join("–" if each["value"] is None else f"{each['value']:.2f}" for each in within["gates"])
    return [
        *markdown_table(["kind", "texts", "pairs", "AUC"], rows),
        "",
        f"By gate, from the first: {gates}. Pairs of one kind, whatever their text: "
        f"{with_limits(within['within_kind'])}.",
    ]


def _doses(tests: Mapping[str, Any]) -> list[str]:
    dose, withheld = tests["dose"], tests["withheld"]
    rows = [
        [j, with_limits(mean), with_limits(exit_layer, ".2f")]
        for j, (mean, exit_layer) in enumerate(zip(dose["means"], dose["exits"], strict=True))
    ]
    return [
        "The status comes from a run whose image left at exit j: j = 0 never saw it.",
        "",
        *markdown_table(["layers that saw the image", "mean p(exit)", "mean exit layer"], rows),
        "",
        f"Slope of the exit layer: {with_limits(dose['exit_slope'], '+.3f')} a layer that saw the image (a gate that "
        "waits for the image has a negative one). With another image, p(exit) changes by "
        f"{with_limits(withheld['swapped'], '+.3f')} and the mean exit layer is "
        f"{with_limits(withheld['exit_swapped'], '.2f')}; seen as it is, {with_limits(withheld['exit_seen'], '.2f')}; "
        f"never seen, {with_limits(withheld['exit_withheld'], '.2f')}.",
    ]


def _asked(cost: Mapping[str, Any]) -> list[str]:
    """What was asked of better gates, and what these reach."""
    share = cost["share_of_oracle"] or 0.0
    rows = [
        ["agreement", with_limits(cost["agreement"], ".4f"), f"at least {MIN_AGREEMENT}",
         cost["agreement"]["value"] >= MIN_AGREEMENT],
        ["loss of accuracy, points", with_limits({key: 100 * each for key, each in cost["loss"].items()}, ".2f"),
         f"at most {100 * MAX_LOSS:g} at the upper limit", cost["loss"]["high"] <= MAX_LOSS],
        ["cost over constants of the text", with_limits(cost["text"]["ratio"]), f"at most {MAX_COST_RATIO}",
         cost["text"]["ratio"]["value"] <= MAX_COST_RATIO],
        ["share of the oracle's saving", f"{share:.2f}", f"at least {MIN_ORACLE_SHARE}", share >= MIN_ORACLE_SHARE],
    ]  # fmt: skip
    cells = [[*row[:3], "met" if row[3] else "**not met**"] for row in rows]
    return [
        f"Cost is decoder FLOPs over the full model's: gates {cost['cost']:.3f} (mean exit "
        f"{cost['mean_exit_layer']:.2f}), constants of the kind {cost['kind']['cost']:.3f} and of the text "
        f"{cost['text']['cost']:.3f} at the same agreement, the oracle {cost['oracle']:.3f} (the first exit from which "
        "on the answer is kept).",
        "",
        *markdown_table(["", "reached", "asked", ""], cells),
    ]


def _bound(cost: Mapping[str, Any], bound: Mapping[str, Any]) -> list[str]:
    """What a classifier that sees everything reaches at the gates' agreement."""
    costs, agreements = zip(*bound["frontier"], strict=True)
    least = mixture_cost(costs, agreements, cost["agreement"]["value"])
    ratio, share = least / cost["text"]["cost"], (1 - least) / (1 - cost["oracle"])
    return [
        "**What the labels let anything reach.** A classifier that sees the statuses of all layers at once, the words "
        f"and the kind of the question, and learned on {bound['questions']:,} training questions which exits keep the "
        f"answer, costs {least:.3f} at the gates' agreement: {ratio:.2f} of the constants of "
        f"the text, and {share:.2f} of the oracle's saving. No gate sees as much."
    ]


if __name__ == "__main__":
    main()
