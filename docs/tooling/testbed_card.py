"""The testbed's model card and documentation page, as Markdown made from its evaluation and its training records."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from analysis.statistics.markdown import markdown_table
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
    """The verdict on three stages after each training stage, one row a run."""
    rows = []
    for name, run in runs.items():
        if run.get("attention"):
            found = {stage: run["attention"][stage]["stages"] for stage in AFTER if stage in run["attention"]}
            rows.append([name, *(_verdict_cell(found[stage]) if stage in found else "-" for stage in AFTER)])
    return joined_table(["run", *(f"after {name}" for name in AFTER.values())], rows)


AFTER = {"language": "stage 0 (language)", "align": "stage 2 (alignment)", "instruct": "stage 3 (instruction)"}
"""Training stages after which attention is looked at."""


def _verdict_cell(stages: dict[str, Any]) -> str:
    """The verdict, with the middle stage's layers, fall and rise, the rarity of the signature, and what fails."""
    word = str(stages["verdict"]).replace("_", " ")
    if stages["change_points"] is None or stages["fall"] is None:
        return word
    first, last = stages["change_points"]
    fall, rise = (
        f"{stages[name][0]:+.2f} [{stages[name][1]:+.2f}, {stages[name][2]:+.2f}]" for name in ("fall", "rise")
    )
    p_value = max(stages["p_values"].values())
    failed = [check for check, passed in stages["checks"].items() if not passed]
    missing = f"; fails {', '.join(failed)}" if failed else ""
    return f"{word}: middle stage layers {first} to {last - 1}, fall {fall}, rise {rise}, p = {p_value:.3f}{missing}"


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


CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
tags: [llava, dyvte, testbed]
---

# llava_shapes

A LLaVA of {millions:.1f} million parameters (CLIP-style tower, MLP projector, Llama decoder) that answers
questions about drawn scenes. The dyvte toolkit trained it, by LLaVA's recipe, on images that it renders itself.
It is an instrument for trying analyses on, **not evidence about LLaVA** or any other model.

    from transformers import AutoModelForImageTextToText, AutoProcessor

## Accuracy

{num_image} held-out image questions and {num_arithmetic} of arithmetic; greedy answers, exact match; 95% intervals by
bootstrap over images. {bar}

{accuracy}

Training data: scenes of two to six objects drawn from seeds; no scene of one split occurs in another, and captioned
scenes are never asked about. Made by `make testbed-eval` in {seconds:.0f} s; training runs and figures in
`docs/testbed.md`.
"""

PAGE = """# The testbed

`llava_shapes` is the small multimodal model that ships with the toolkit: an instrument with known ground truth, trained
by LLaVA's recipe. **A finding on it is a finding on it**, not about LLaVA. `make testbed-eval` writes this page.

![The world: scenes and their questions](testbed/world.png)

## World and questions

Two to six objects of a colour, a shape and a size lie in the cells of a 3 x 3 grid, moved, rotated and tinted, on grey
textures with noise (`dyvte/testbed/world.py`). Questions (`dyvte/testbed/questions.py`) differ in how many
look-ups they need, their *hops*. The path kinds (attribute, same_attribute, neighbor, two_hop) share one template,
one length and one answer set, so that their exit depths compare without a confound.
`tests/test_testbed_world.py` checks every answer with a second solver and holds a guesser that sees only the
question to the chance rate.

## Accuracy

{num_image} held-out image questions; 95% intervals by bootstrap over images. {bar}

{accuracy}

The last two columns are what can be had without an image: a model of the same architecture trained on the questions
alone, and the most frequent answer (told which attribute is asked). No training image was empty: the blank one makes
the model say `{blank_answer}` to {blank_share:.0%} of the image questions, yes-or-no questions and colours among them,
which is why that column can lie below guessing.

Matched questions (same image, start, asked attribute and length; only the steps differ):

{matched}

## What the decoder is given

A linear probe on the projected visual token under an object's centre:

{probes}

Where the second half stays near the majority rate, relations between objects are not in the decoder's input token by
token: following them is the decoder's work.

## Training

`python -m dyvte.testbed.train` runs the four stages (language, vision, align, instruct); every batch is a function of
the seed and the step, so a killed and resumed run equals an uninterrupted one.

From a plain start the decoder stays for thousands of steps where it names attributes that are in the image, of the
wrong object. What the recipe does about it:

- Heads start as copiers: value times output matrix near the identity (Trockman and Kolter, "Mimetic Initialization of
  Self-Attention Layers", ICML 2023), wider query and key matrices, a read-out that begins as the word embeddings
  (`initialise_decoder`).
- The projector starts where each patch says the words for what lies under it, the labels of the tower's own stage
  (`initialise_projector`); then it trains on captions.
- Tours and captions (`dyvte/testbed/tours.py`) teach stage 0 and alignment. From alignment on the projector moves
  slowly: a faster one forgets where a patch lies, without which no relation can be learnt.
- Instruction has four phases (`phases` in `conf/testbed.yaml`). Each begins with much practice in few words, about
  caption scenes only (`dyvte/testbed/lookups.py`), and thins it out: finding an object by name or place; yes or no and
  how many, as questions without their filler words; steps from one object to another; all of it again at a slowly
  falling rate, most of all what was still wrong. In the first phase, which asks in whole sentences only, existence and
  relation stay near chance; they rise in the second. That phase also asks them more often, and no run took these
  changes one at a time.

These starts make the testbed learnable on two cores. They also shape its attention, one more reason not to read its
curves as LLaVA's.

{runs}

The smaller runs take the tower of main: `python -m dyvte.testbed.train name=seed1 seed=4 init_from=outputs/testbed/main
'stages=[language,align,instruct]' 'instruct.phases=[find,judge,follow]' +phases.follow.settings.steps=2400`, seed2 with
`seed=8`, and no_language with `seed=4` and without `language` among the stages.

![Validation accuracy while instructing](testbed/training.png)

## How the recipe shapes attention

![Attention mass after each training stage](testbed/attention_mass.png)

![Enrichment without sink after each training stage](testbed/attention_enrichment.png)

The verdict on three stages ([what it asks for](stage_verdict.md)) after each training stage, on the questions behind
the curves. Fall and rise are in log enrichment (0.69 = a factor of two) at the change points that fit best, with 95%
bands that hold for all change points together; p: how often a random order of the layers, or of the steps between
them, shows the signature as clearly, which for so few layers is often.

{verdicts}

Mean exit depth by kind with 95% intervals: decoder layers that must see the image for the answer to stay the same (the
answer alone; `analysis.exits` also asks for its cross-entropy to stay, which takes more layers):

{depths}

## What holds in every run

Statements about this testbed, each against 95% intervals within a run, and the runs in which they hold. What does not
hold in all of them is a finding on the weights of the others.

{statements}
"""


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
    return CARD.format(**values), PAGE.format(**values)
