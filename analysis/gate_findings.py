"""`python -m analysis.gate_findings`: what the shipped gates reach on fresh questions, written into docs/gates.md.

The gates are evaluated as by `python -m dyvte.evaluate`: a run that is there is reused, one that was killed goes on,
`torchrun` splits it. Its tables become the part of the page between its two comments. The numbers are kept beside it,
with digests of weights and gates, by which a test tells that the page is out of date.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import DictConfig, OmegaConf
from torch.nn.functional import one_hot

from dyvte.calibrate import build_policy
from dyvte.errors import ConfigError, RunFolderError
from dyvte.evaluate import control_table, evaluate, expected_figures, figures, policy_in_words
from dyvte.gates.controls import exits_by_hops
from dyvte.gates.labels import LabelSet
from dyvte.gates.module import SHIPPED_GATES, load_gates
from dyvte.instrument.sweep.criteria import exit_depth, lucky_exit_depth
from dyvte.policies.exits.dynamic_exit import DynamicExit
from dyvte.runs import distributed
from dyvte.runs.config import command
from dyvte.runs.store import RunFolder, plain, write_atomic, write_json
from dyvte.testbed.questions import IMAGE_KINDS, PATH_KINDS

from .measuring.runs import shipped_files
from .statistics.markdown import markdown_table, replace_section

SECTION = "gates"

MAX_LOSS, MIN_AGREEMENT, MAX_COST_RATIO = 0.01, 0.985, 0.8
"""What was asked of the gates on image questions before any was trained."""
MAX_TRAINING_SECONDS = 60

ON_IMAGES = "gates, image questions"
FIRST, KEPT = "oracle, first exit that keeps the answer", "oracle, first exit from which on it is kept"
CONTROLS = {
    "permuted": "the gates' exits, permuted",
    "permuted within kind": "the gates' exits, permuted within kinds",
    "fixed exit": "best fixed exit, chosen on validation data",
    "fixed exit by kind": "best fixed exit of each kind, likewise",
    "question only": "gates that saw the question only",
}


# ---------------------------------------------------------------------------- numbers


def comparison(cfg: DictConfig, answers: pd.DataFrame, reference: LabelSet) -> list[dict[str, Any]]:
    """The table: gates, controls and oracles, the controls and oracles on image questions alone."""
    on_images = answers[answers["kind"].isin(IMAGE_KINDS)].reset_index(drop=True)
    agree = reference.agree[reference.rows_of(on_images)]
    policy = build_policy(cfg.policy)
    assert isinstance(policy, DynamicExit)
    controls = control_table(policy, cfg.policy.gates, on_images, reference).set_index("policy")
    oracles = {FIRST: lucky_exit_depth(agree), KEPT: exit_depth(agree)}
    found: dict[str, Mapping[str, Any]] = {
        ON_IMAGES: figures(on_images, reference),
        "gates, with arithmetic": figures(answers, reference),
        **{title: dict(controls.loc[name]) for name, title in CONTROLS.items() if name in controls.index},
    }
    for title, exits in oracles.items():
        share = one_hot(exits, reference.num_layers + 1).double()
        found[title] = expected_figures(share, on_images, reference)
    return [{"name": name, **_row(each)} for name, each in found.items()]


def _row(found: Mapping[str, Any]) -> dict[str, Any]:
    """The columns that are shown, from `figures` or from a row of controls, which name their intervals differently."""
    row: dict[str, Any] = {}
    for column in ("agreement", "accuracy", "accuracy_loss"):
        limits = found.get(f"{column}_ci") or (found[f"{column}_low"], found[f"{column}_high"])
        row |= {column: found[column], f"{column}_ci": list(limits)}
    return row | {column: found[column] for column in ("mean_exit_layer", "cost", "cost_of_fixed_exits", "cost_ratio")}


def training_facts(cfg: DictConfig) -> dict[str, Any]:
    """How the gates were made, and `seconds` of their training, None where `cfg.training` is not their run."""
    facts = load_gates(cfg.policy.gates).facts
    known: dict[str, Any] = facts["validation"]
    file = Path(cfg.training) / "summary.json"
    run = json.loads(file.read_text()) if file.is_file() else {}
    same = all(run.get(key) == value for key, value in known.items())
    recipe = {key: facts["recipe"][key] for key in ("name", "rule", "members", "bound", "caution", "confidence")}
    return {"data": facts["data"], **known, **recipe, "seconds": run["training_seconds"] if same else None}


def findings(cfg: DictConfig, summary: Mapping[str, Any]) -> dict[str, Any]:
    """Every number of the section, from the finished run."""
    folder = RunFolder(Path(cfg.output_dir))
    answers = folder.read_table("samples")
    reference = LabelSet(RunFolder(Path(cfg.reference_dir) / summary["reference"]))
    on_paths = answers[answers["kind"].isin(PATH_KINDS)].reset_index(drop=True)
    of_paths = exits_by_hops(on_paths, reference)
    found: dict[str, Any] = {
        **shipped_files(),
        "data": {key: cfg.data[key] for key in ("split", "seed", "limit")},
        "questions": answers["kind"].value_counts().sort_index().to_dict(),
        "images": answers["image_id"].nunique(),
        "num_layers": summary["num_layers"],
        "rows": comparison(cfg, answers, reference),
        "hops": folder.read_table("hops").to_dict("records"),
        "hops_of_paths": [] if of_paths is None else of_paths.to_dict("records"),
        "training": training_facts(cfg),
    }
    return dict(plain(found))


# --------------------------------------------------------------------------- verdicts


def criteria(row: Mapping[str, Any]) -> list[tuple[str, str, str, bool]]:
    """What was asked of the gates, what they reach, and whether that is enough: criterion, asked, reached, met."""
    loss, agreement, cost = row["accuracy_loss_ci"][1], row["agreement"], row["cost_ratio"]
    limit, least = f"at most {100 * MAX_LOSS:g} point", f"at least {100 * MIN_AGREEMENT:.1f}%"
    flops = "decoder FLOPs over those of fixed exits at the same agreement"
    return [
        ("accuracy loss, upper end of its 95% interval", limit, f"{100 * loss:.2f} points", loss <= MAX_LOSS),
        ("answers equal to the full model's", least, f"{100 * agreement:.2f}%", agreement >= MIN_AGREEMENT),
        (flops, f"at most {MAX_COST_RATIO:g}", f"{cost:.3f}", cost <= MAX_COST_RATIO),
    ]


def hops_verdict(rows: Sequence[Mapping[str, Any]]) -> str:
    """Whether depth rises with hops: `found`, `opposite found` or `not found`.

    Found if every further hop, from the first one on, adds depth with a 95% interval above 0; the opposite if every one
    takes depth away likewise. The step from no hop to one only tells questions that need the image from others. The
    rows are those of one measure of `exits_by_hops`.
    """
    steps = [row for row in rows if _compared(row)]
    if steps and all(row["step_low"] > 0 for row in steps):
        return "found"
    return "opposite found" if steps and all(row["step_high"] < 0 for row in steps) else "not found"


def _compared(row: Mapping[str, Any]) -> bool:
    """Whether this is a step from some hops to one more, with an interval: it takes questions about two images."""
    return row["hops"] > 1 and row["step_low"] is not None


def by_measure(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Rows of `exits_by_hops` by what was measured, the exit depth's oracle first, the gates last."""
    titles = {KEPT: KEPT, FIRST: FIRST, "policy": "gates"}
    return {title: [row for row in rows if row["measure"] == measure] for measure, title in titles.items()}


# --------------------------------------------------------------------------- the page


def section(found: Mapping[str, Any]) -> str:
    """What stands between the two comments."""
    rows = {row["name"]: row for row in found["rows"]}
    parts = [_intro(found), _table(found), _criteria(rows[ON_IMAGES]), _distance(rows)]
    return "\n\n".join([*parts, _hops(found), _training(found["training"])])


def _intro(found: Mapping[str, Any]) -> str:
    kinds = {kind: number for kind, number in found["questions"].items() if kind in IMAGE_KINDS}
    low, high = min(kinds.values()), max(kinds.values())
    each = f"{low}" if low == high else f"{low} to {high}"
    data = found["data"]
    return _wrapped(
        f"`python -m analysis.gate_findings` wrote this section; weights `{found['weights']}`, gates "
        f"`{found['gates']}`. {sum(kinds.values()):,} questions about images, {each} of each of {len(kinds)} kinds, "
        f"and apart from them {found['questions'].get('arithmetic', 0):,} arithmetic ones, which need no image: "
        f"{found['images']:,} images of the {data['split']} split with `data.seed={data['seed']}`, on which nothing "
        "was chosen, neither gates, thresholds nor recipe. In brackets 95% intervals, clustered by image. Cost is the "
        "decoder's FLOPs in the prefill over the full model's; the last column divides it by that of the cheapest "
        "mixture of fixed exits with the same agreement, chosen on these very questions. Rows below the second are on "
        "the image questions."
    )


def _table(found: Mapping[str, Any]) -> str:
    head = ["", "agreement", "accuracy", "loss, points", f"mean exit of {found['num_layers']}", "cost"]
    head.append("over fixed exits")
    cells = []
    for row in found["rows"]:
        low, high = row["agreement_ci"]
        loss = [100 * each for each in (row["accuracy_loss"], *row["accuracy_loss_ci"])]
        kept = "1" if row["agreement"] == 1 else f"{row['agreement']:.3f} [{low:.3f}, {high:.3f}]"
        lost = "0" if loss == [0, 0, 0] else f"{loss[0]:.1f} [{loss[1]:.1f}, {loss[2]:.1f}]"
        numbers = [f"{row['mean_exit_layer']:.1f}", f"{row['cost']:.3f}", f"{row['cost_ratio']:.3f}"]
        cells.append([row["name"], kept, f"{row['accuracy']:.3f}", lost, *numbers])
    return "\n".join(markdown_table(head, cells))


def _criteria(row: Mapping[str, Any]) -> str:
    checks = criteria(row)
    cells = [(*texts, _met(met)) for *texts, met in checks]
    met = sum(is_met for *_, is_met in checks)
    title = f"**What was asked of them**, on image questions: {met} of {len(checks)} met."
    return "\n".join([title, "", *markdown_table(["", "asked", "reached", ""], cells)])


def _distance(rows: Mapping[str, Mapping[str, Any]]) -> str:
    own, first, kept = (rows[name]["cost"] for name in (ON_IMAGES, FIRST, KEPT))
    return _wrapped(
        f"**Distance to the oracle.** The gates cost {own:.3f}. An oracle that knew the first exit from which on the "
        f"answer is kept would cost {kept:.3f}, so the gates have {_share(own, kept)} of its saving; one that also "
        f"picks exits that keep the answer by luck, before later ones lose it, {first:.3f} ({_share(own, first)})."
    )


def _share(own: float, oracle: float) -> str:
    return f"{100 * (1 - own) / (1 - oracle):.0f}%" if oracle < 1 else "all"


def _hops(found: Mapping[str, Any]) -> str:
    everything, paths = by_measure(found["hops"]), by_measure(found["hops_of_paths"])
    verdicts, of_paths = ({title: hops_verdict(rows) for title, rows in each.items()} for each in (everything, paths))
    text = (
        "**Do more hops exit later?** The hypothesis, stated before any figure, says yes. It counts as found if each "
        "further hop, from one to two and from two to three, adds depth with a 95% interval above 0, its opposite if "
        "each takes depth away, and else neither. Arithmetic, without a hop, only shows what needs no image. "
        f"For the oracle (first exit from which on the answer is kept): **{verdicts[KEPT]}**; with lucky exits: "
        f"{verdicts[FIRST]}. For the gates: **{verdicts['gates']}**."
    )
    narrow = (
        f"Kinds of one number of hops differ in more than hops. Among the kinds {', '.join(PATH_KINDS)}, which share "
        f"template, length and answers: oracle **{of_paths[KEPT]}**, with lucky exits {of_paths[FIRST]}, gates "
        f"**{of_paths['gates']}**."
    )
    return "\n\n".join([_wrapped(text), _depths(everything), _wrapped(narrow), _depths(paths)])


def _depths(measures: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    numbers = {row["hops"]: row["questions"] for rows in measures.values() for row in rows}
    hops = sorted(numbers)
    head = ["mean exit layer", *(f"{each} hop{'' if each == 1 else 's'}" for each in hops), "steps"]
    cells = [["questions", *(f"{numbers[each]:,}" for each in hops), ""]]
    for title, rows in measures.items():
        depths = [f"{row['depth']:.1f} {_interval(row['low'], row['high'])}" for row in rows]
        steps = [f"{row['step']:+.1f} {_interval(row['step_low'], row['step_high'])}" for row in rows if _compared(row)]
        cells.append([title, *depths, ", ".join(steps)])
    return "\n".join(markdown_table(head, cells))


def _interval(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"[{low:.1f}, {high:.1f}]"


def _training(facts: Mapping[str, Any]) -> str:
    took = "The run that trained them is not at hand, so its time is not stated."
    if (seconds := facts["seconds"]) is not None:
        took = (
            f"From the labels on disk training took {seconds:.0f} seconds, the gates that see the question only "
            f"included (asked: under {MAX_TRAINING_SECONDS}, {_met(seconds < MAX_TRAINING_SECONDS)})."
        )
    return _wrapped(
        f"**Training.** {facts['train_questions']:,} questions of `{facts['data']}`, recipe `{facts['name']}`: labels "
        f"`{facts['rule']}`, {facts['members']} gates a layer averaged. Another {facts['validation_questions']:,}, "
        "about other images, arithmetic included, were for early stopping, threshold and the fixed exits of the table. "
        f"On these the gates agree with the full model on {100 * facts['agreement']:.1f}% of the answers (upper limit "
        f"of the rest at {100 * facts['confidence']:.0f}% confidence: {100 * facts['disagreement_upper_limit']:.2f}%, "
        f"`bound` {100 * facts['bound']:.2f}%) at a cost of {facts['cost']:.3f}, where the cheapest mixture of fixed "
        f"exits costs {facts['cost_of_fixed_exits']:.3f} and the oracle {facts['cost_of_oracle']:.3f}. {took}"
    )


def _met(is_met: bool) -> str:
    return "met" if is_met else "**not met**"


def _wrapped(text: str) -> str:
    """Lines as long as those of the page around it; code and links stay whole."""
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def with_section(text: str, found: Mapping[str, Any]) -> str:
    """The page with the section in its place."""
    return replace_section(text, SECTION, f"\n{section(found)}\n")


# ---------------------------------------------------------------------------- command


def finish(cfg: DictConfig) -> dict[str, Any] | None:
    """Start or continue the evaluation; one of other weights or settings is replaced. None but in the first process."""
    try:
        return evaluate(cfg)
    except RunFolderError:
        if distributed.world_size() > 1:  # only the first process gets to know
            raise
        replaced = OmegaConf.merge(cfg, {"overwrite": True})
        assert isinstance(replaced, DictConfig)
        return evaluate(replaced)


@command("gate_findings")
def main(cfg: DictConfig) -> str | None:
    """Evaluate the shipped gates and write the section."""
    if cfg.model.name not in SHIPPED_GATES or cfg.policy.get("gates") != cfg.model.name:
        raise ConfigError(f"the page is about the gates that ship: model and policy.gates must be {set(SHIPPED_GATES)}")
    page = Path(cfg.page)
    replace_section(page.read_text(), SECTION, "")  # it is refused before minutes of questions
    summary = finish(cfg)
    if summary is None:
        return None
    found = findings(cfg, summary)
    text = with_section(page.read_text(), found)
    write_json(Path(cfg.findings), found)
    write_atomic(page, lambda out: out.write(text.encode()))
    print(section(found))
    print(f"page: {page}")
    return policy_in_words(summary)


if __name__ == "__main__":
    main()
