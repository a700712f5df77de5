"""The testbed's model card and documentation page, as Markdown made from its evaluation and its training records."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from analysis.statistics.markdown import markdown_table
from analysis.statistics.verdicts import verdict_word
from docs.tooling.generated import fill
from docs.tooling.testbed_probes import NEIGHBOR, OWN
from dyvte.testbed.questions import IMAGE_KINDS, KINDS, PATH_KINDS
from dyvte.testbed.training.batches import STAGES

CONDITIONS = {"with the image": "image", "blank image": "blank", "another scene's image": "other"}
REQUIRED_OVERALL, REQUIRED_KIND = 0.90, 0.80


def interval(entry: dict[str, float]) -> str:
    """Accuracy with its 95% interval."""
    return f"{entry['accuracy']:.3f} [{entry['low']:.3f}, {entry['high']:.3f}]"


def joined_table(head: Sequence[Any], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table as one text."""
    return "\n".join(markdown_table(head, rows))


def accuracy_markdown(result: dict[str, Any], blind: dict[str, Any] | None) -> str:
    """One row a kind: hops, accuracy under each condition with 95% intervals, the blind control, the majority rate."""
    rows = []
    for kind in [*KINDS, "image"]:
        cells = [interval(result["accuracy"][key][kind]) for key in CONDITIONS.values()]
        control = interval(blind["accuracy"][kind]) if blind else "not recorded"
        name = "**all image kinds**" if kind == "image" else kind
        rows.append([name, KINDS.get(kind, ""), *cells, control, f"{result['majority'][kind]:.3f}"])
    return joined_table(["kind", "hops", *CONDITIONS, "trained on questions alone", "majority"], rows)


def probe_markdown(probes: dict[str, dict[str, float]]) -> str:
    """One row a probe."""
    rows = [[n, interval(p), f"{p['majority']:.3f}", p["num"]] for n, p in probes.items()]
    return joined_table(["one visual token tells", "linear probe", "majority", "objects"], rows)


def runs_markdown(runs: dict[str, dict[str, Any]]) -> str:
    """One row a training run."""
    rows = []
    for name, run in runs.items():
        steps = " / ".join(str(run["logs"][s][-1]["step"]) if s in run["logs"] else "-" for s in STAGES)
        minutes = f"{sum(run['seconds'].values()) / 60:.0f}"
        exits = "-"
        if "exits" in run:
            agree = run["exits"]["agreement"]["mean"]
            layers = len(agree) - 1
            exits = " ".join(f"{agree[k]:.2f}" for k in (0, layers // 4, layers // 2, 3 * layers // 4))
        rows.append([name, run["config"]["seed"], steps, minutes, interval(run["accuracy"]["image"]), exits])
    steps = f"steps ({' / '.join(STAGES)})"
    head = ["run", "seed", steps, "minutes", "image accuracy", "agreement at k = 0, L/4, L/2, 3L/4"]
    notes = [f"Note on {name}: {run['note']}" for name, run in runs.items() if run.get("note")]
    machines = list(dict.fromkeys(run["machine"] for run in runs.values()))
    where = [f"Trained and recorded on {'; '.join(machines)}."] if machines else []
    return "\n\n".join([joined_table(head, rows), *where, *notes])


def depth_markdown(runs: dict[str, dict[str, Any]]) -> str:
    """Mean exit depth by kind, one row a run."""
    rows = []
    for name, run in runs.items():
        if "exits" in run:
            depths = [run["exits"]["exit_depth"][k] for k in IMAGE_KINDS]
            rows.append([name, *(f"{d['mean']:.1f} [{d['low']:.1f}, {d['high']:.1f}]" for d in depths)])
    return joined_table(["run", *IMAGE_KINDS], rows)


def verdicts_markdown(runs: dict[str, dict[str, Any]]) -> str:
    """The verdict on three stages after each training stage, one row a run; runs of earlier rules are left out."""
    rows = []
    for name, run in runs.items():
        attention = run.get("attention") or {}
        found = {stage: attention[stage]["stages"] for stage in AFTER if stage in attention}
        if any("claims" in stages for stages in found.values()):
            rows.append([name, *(_verdict_cell(found[stage]) if stage in found else "-" for stage in AFTER)])
    if not rows:
        return "The training runs were recorded before these rules and have not been judged by them."
    return joined_table(["run", *(f"after {name}" for name in AFTER.values())], rows)


AFTER = {"language": "stage 0 (language)", "align": "stage 2 (alignment)", "instruct": "stage 3 (instruction)"}
"""Training stages after which attention is looked at."""


def _verdict_cell(stages: dict[str, Any]) -> str:
    """The verdict, with the middle stage's layers, fall and rise, and the claims."""
    word = str(stages["verdict"]).replace("_", " ")
    if (contrasts := stages["contrasts"]) is None:
        return word
    first, last = contrasts["split"]
    fall, rise = (
        f"{contrasts[name][0]:+.2f} [{contrasts[name][1]:+.2f}, {contrasts[name][2]:+.2f}]" for name in ("fall", "rise")
    )
    claims = ", ".join(f"{claim.replace('_', ' ')} {verdict_word(found)}" for claim, found in stages["claims"].items())
    return f"{word}: middle stage layers {first} to {last - 1}, fall {fall}, rise {rise}; {claims}"


KEPT_ANSWERS, DEEP = 0.9, 0.75
KNOWN, NEAR_MAJORITY = 0.9, 0.1


def _falls_and_rises(run: dict[str, Any]) -> tuple[bool, str]:
    """Whether the image's enrichment has a low layer between two higher ones, told apart by their intervals."""
    cross = run["attention"]["instruct"]["enrichment_no_sink"]["cross"]
    mean, low, high = cross["mean"], cross["low"], cross["high"]
    least = min(range(len(mean)), key=mean.__getitem__)
    before, after = ([low[i] for i in part] for part in (range(least), range(least + 1, len(mean))))
    holds = bool(before and after) and max(before) > high[least] and max(after) > high[least]
    return holds, f"{mean[0]:.2f}, lowest {mean[least]:.2f} in layer {least}, {mean[-1]:.2f} in the last"


def _stops_contributing(run: dict[str, Any]) -> tuple[bool, str]:
    """Whether answers stay without the image in the last quarter of the layers, by the lower limits of agreement."""
    low = run["exits"]["agreement"]["low"]
    layers = len(low) - 1
    first = next(k for k in range(layers + 1) if min(low[k:]) >= KEPT_ANSWERS)
    return first <= DEEP * layers, f"from k = {first} of {layers}"


def _deeper_with_hops(run: dict[str, Any]) -> tuple[bool, str]:
    """Whether questions of two and of three hops exit later than those of one on the same template, by intervals."""
    depth = run["exits"]["exit_depth"]
    kinds = [k for k in PATH_KINDS if k != "attribute"]
    holds = all(depth[k]["low"] > depth["attribute"]["high"] for k in kinds)
    return holds, ", ".join(f"{k} {depth[k]['mean']:.1f}" for k in ("attribute", *kinds))


def _tokens_know_their_object(run: dict[str, Any]) -> tuple[bool, str]:
    """Whether a linear probe reads an object's attributes off its visual token, and its neighbour's hardly."""
    own, neighbor = (
        [probe for name, probe in run["probes"].items() if name.startswith(whose)] for whose in (OWN, NEIGHBOR)
    )
    holds = all(probe["low"] >= KNOWN for probe in own)
    holds = holds and all(probe["high"] <= probe["majority"] + NEAR_MAJORITY for probe in neighbor)
    shares = [" ".join(f"{probe['accuracy']:.2f}" for probe in probes) for probes in (own, neighbor)]
    majority = " ".join(f"{probe['majority']:.2f}" for probe in neighbor)
    return holds, f"own {shares[0]}; neighbour's {shares[1]}, majority {majority}"


STATEMENTS = {
    f"one visual token tells its object's attributes to a linear probe (at least {KNOWN:.0%} each), and its "
    f"neighbour's with at most {100 * NEAR_MAJORITY:.0f} points more than the majority rate": _tokens_know_their_object,
    "after instruction the image's enrichment falls over the layers and rises again": _falls_and_rises,
    f"visual tokens stop contributing: at least {KEPT_ANSWERS:.0%} of the answers stay under every exit in the last "
    "quarter of the layers": _stops_contributing,
    "questions of more hops than one exit later, template and answers alike": _deeper_with_hops,
}


def statements_markdown(runs: dict[str, dict[str, Any]]) -> str:
    """What this page says of the trained model, against every training run that saw images."""
    trained = {name: run for name, run in runs.items() if "exits" in run}
    rows = [["right answers to image questions", *(interval(run["accuracy"]["image"]) for run in trained.values())]]
    for statement, holds_in in STATEMENTS.items():
        cells = []
        for run in trained.values():
            holds, figures = holds_in(run)
            cells.append(f"{'yes' if holds else '**no**'} ({figures})")
        rows.append([statement, *cells])
    return joined_table(["statement", *trained], rows)


def bar_sentence(bar: dict[str, Any]) -> str:
    """Whether the model meets the project's bar, and what falls short."""
    wanted = (
        f"the project's bar (at least {REQUIRED_OVERALL:.0%} over image questions,\n"
        f"no kind of one or two hops under {REQUIRED_KIND:.0%})"
    )
    if bar["met"]:
        return f"It meets {wanted}."
    below = ", ".join(f"{k} {v:.3f}" for k, v in bar["kinds_below"].items())
    return f"It does **not** meet {wanted}" + (f"; kinds below it: {below}." if below else "; the mean is below it.")


def documents(result: dict[str, Any], runs: dict[str, dict[str, Any]], parameters: int) -> tuple[str, str]:
    """The model card (``README.md`` beside the weights) and ``docs/testbed.md``."""
    matched = [[k, KINDS[k], interval(v)] for k, v in result["matched"].items() if k != "image"]
    values = {
        "millions": parameters / 1e6,
        "num_image": result["accuracy"]["image"]["image"]["num"],
        "num_arithmetic": result["accuracy"]["image"]["arithmetic"]["num"],
        "bar": bar_sentence(result["bar"]),
        "accuracy": accuracy_markdown(result, runs.get("blind")),
        "matched": joined_table(["kind", "hops", "accuracy"], matched),
        "probes": probe_markdown(result["probes"]),
        "runs": runs_markdown(runs),
        "depths": depth_markdown(runs),
        "statements": statements_markdown(runs),
        "verdicts": verdicts_markdown(runs),
        "blank_answer": result["said_to_blank"]["answer"],
        "blank_share": result["said_to_blank"]["share"],
        "seconds": result["seconds"],
    }
    return fill("testbed_card", values), fill("testbed_page", values)
