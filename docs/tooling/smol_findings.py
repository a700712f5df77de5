"""What became of the registered hypotheses about `llava_smol`: `python -m docs.tooling.smol_findings`.

Reads finished runs (the page names their commands) and `docs/testbed_smol/evaluation.json`, applies the rules of
`docs/hypotheses_smol.md`, and writes `docs/findings_smol.md`. A hypothesis whose runs are missing is not yet tested.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from jinja2 import Environment, StrictUndefined

from analysis.lens import outline
from analysis.plots import style as plots
from analysis.statistics.bands import Band, ImageBootstrap
from docs.tooling.comparison import comparison_section, record
from docs.tooling.generated import write_generated
from docs.tooling.hero import draw_hero
from dyvte.gates.metrics import share_interval
from dyvte.runs.store import write_atomic
from dyvte.testbed.smol.questions import IMAGE_KINDS

PAGE = Path("docs/findings_smol.md")
TEMPLATE = Path(__file__).with_name("smol_findings.md.j2")
FIGURES = Path("docs/testbed_smol")
STAGES = Path("outputs/stages/llava_smol/english")
EXITS = Path("outputs/exits/llava_smol/english")
WALKED = Path("outputs/exits/llava_smol/walked")
RECALL = Path("outputs/exits/llava_smol/recall")
CUTS = Path("outputs/knockout/llava_smol/english")
LATE = Path("outputs/knockout/llava_smol/late")
RECALL_CUTS = Path("outputs/knockout/llava_smol/recall")
GATES = Path("outputs/gate_claims/llava_smol/english")
GATED = Path("outputs/evaluate/llava_smol/english/dynamic_exit")
LENS = Path("outputs/lens/llava_smol/english")
METHODS = Path("outputs/tables/all_methods/llava_smol/english")
CONTROLS = FIGURES / "controls.json"
"""Accuracy of the trainings beside the main one, by `docs.tooling.smol_controls`."""
TRAIL = FIGURES / "trail.json"
"""The valley after each phase of the main training, by `docs.tooling.smol_trail`."""
SEEDS, UNTRAINED, PROJECTOR = ("seed1", "seed2"), "random", "projector"
ORDER = (*SEEDS, UNTRAINED, PROJECTOR)
"""Of the trainings on the page; others come behind."""


def stages_of(control: str) -> Path:
    """The attention run of one of the trainings beside the main one."""
    return Path(f"outputs/stages/llava_smol_{control}/english")


ONE_PATH = "replace=[] control=false objects=false entry_exit=false"
ONE_WINDOW = f"{ONE_PATH} 'splits=[]'"
OF_RECALL = "data=english 'data.kinds=[recall_look,look_recall]' data.per_scene=2 data.name=recall"
SWEPT = "python -m analysis.exits model=llava_smol model.dtype=bfloat16 accuracy=false data.limit={n}"
CUT = "python -m analysis.knockout model=llava_smol model.dtype=bfloat16 data.limit={n}"
COMMANDS = {
    STAGES: "python -m analysis.stages model=llava_smol data=english data.limit={n}",
    EXITS: f"{SWEPT} data=english",
    WALKED: f"{SWEPT} data=english data.matched=true data.name=walked",
    RECALL: f"{SWEPT} {OF_RECALL}",
    CUTS: f"{CUT} data=english width=5 'paths=[[visual,visual],[instruction,visual]]' {ONE_PATH}",
    LATE: f"{CUT} data=english 'windows=[[20,30]]' 'paths=[[instruction,visual]]' {ONE_WINDOW} output_dir={LATE}",
    RECALL_CUTS: f"{CUT} {OF_RECALL} 'windows=[[0,5]]' 'paths=[[instruction,visual]]' {ONE_WINDOW}",
    GATES: (
        "python -m analysis.gate_claims model=llava_smol model.dtype=bfloat16 data=english data.limit={n} batch_size=4"
    ),
    GATED: (
        "python -m dyvte.evaluate model=llava_smol model.dtype=bfloat16 data=english data.limit={n} "
        "policy=dynamic_exit policy.gates=llava_smol"
    ),
    LENS: "python -m analysis.lens model=llava_smol model.dtype=bfloat16 data=english data.limit={n} batch_size=8",
    METHODS: (
        "python -m analysis.tables experiment=all_methods model=llava_smol model.dtype=bfloat16 data=english "
        "data.limit={n} data@calibration.data=english_validation calibration.data.limit=128 gates=llava_smol "
        "batch_size=16 max_new_tokens=16 experiment.random_seeds=1"
    ),
}
CONTROL_COMMANDS = {
    stages_of(name): (
        f"python -m analysis.stages model=llava_smol model.path=outputs/smol/{name}/model model.name=llava_smol_{name} "
        "data=english data.limit={n}"
    )
    for name in (*SEEDS, UNTRAINED, PROJECTOR)
}
COMMAND = "python -m docs.tooling.smol_findings"
SECTION = "smol"
ALT = "Attention on the image over 30 layers, answers that stay without it, and where gates let it go"
SPLIT = (5, 20)
VALLEY = np.log(1.1)
LATE_COST = 2.0
"""Points that the knock-out of late layers has to cost (H3)."""
LEAST_ACCURACY = 0.60
CONFIRMED, REFUTED, UNDETERMINED, OPEN = "confirmed", "refuted", "undetermined", "not yet tested"


TITLES = {
    "H1": "attention on the image has a valley at layers 5 to 19",
    "H2": "cutting patches off patches costs most in the middle",
    "H3": "the last ten layers use the image",
    "H4": "the valley needs pretraining",
    "H5": "questions of more steps need the image longer",
    "H6": "the valley needs the language model to adapt",
    "H7": "gates see that the image was withheld",
    "H8a": "recall, then look: late entry costs less",
    "H8b": "look, then recall: early exit costs less",
}


@dataclass(frozen=True)
class Outcome:
    """What a rule says of one hypothesis, and the numbers it rests on."""

    verdict: str
    numbers: str


def limits(values: np.ndarray, images: np.ndarray, level: float, statistic: Callable[..., Any]) -> tuple[float, float]:
    """Percentile limits of a statistic of the mean over samples, resampling images."""
    replicates = np.apply_along_axis(statistic, -1, ImageBootstrap(images, 2000).replicates(values))
    low, high = np.quantile(replicates, [1 - level, level])
    return float(low), float(high)


def sides_of_valley(layers: pd.DataFrame) -> dict[str, tuple[float, float, float]]:
    """Log ratio of the image's enrichment without the sink, first and last layers over the middle, and its limits.

    Args:
        layers: the table of `analysis.stages`, a row a question and layer.

    Returns:
        `first` and `last`: estimate and one-sided 95% limits, images resampled.
    """
    wide = layers.pivot(index="id", columns="layer", values="cross_enrichment_no_sink").dropna()
    images = layers.drop_duplicates("id").set_index("id").loc[wide.index, "image_id"].to_numpy()
    first, last = SPLIT

    def rise(side: slice) -> Callable[[np.ndarray], float]:
        return lambda curve: float(np.log(curve[side].mean() / curve[first:last].mean()))

    rises = {"first": rise(slice(0, first)), "last": rise(slice(last, None))}
    values = wide.to_numpy()
    return {name: (each(values.mean(0)), *limits(values, images, 0.95, each)) for name, each in rises.items()}


def valley(layers: pd.DataFrame) -> Outcome:
    """H1: both sides of the middle lie above it, in log ratios of the image's enrichment without the sink."""
    numbers, verdicts = [], []
    for name, rise in sides_of_valley(layers).items():
        numbers.append("{} / middle {:.2f} [{:.2f}, {:.2f}]".format(name, *np.exp(rise)))
        verdicts.append(CONFIRMED if rise[1] > VALLEY else REFUTED if rise[2] < VALLEY else UNDETERMINED)
    verdict = REFUTED if REFUTED in verdicts else CONFIRMED if set(verdicts) == {CONFIRMED} else UNDETERMINED
    return Outcome(verdict, "enrichment, " + "; ".join(numbers) + " (one-sided 95% limits)")


def valley_in_all(main: Outcome, seeds: Mapping[str, Outcome]) -> Outcome:
    """H1: the main run refutes alone; to confirm it takes the main run and every seed."""
    numbers = "; ".join([main.numbers, *(f"{name}: {each.verdict}, {each.numbers}" for name, each in seeds.items())])
    verdict = main.verdict
    if verdict == CONFIRMED and len(seeds) < len(SEEDS):
        verdict = "confirmed in the main run; the seeds are missing"
    elif verdict == CONFIRMED and {each.verdict for each in seeds.values()} != {CONFIRMED}:
        verdict = UNDETERMINED
    return Outcome(verdict, numbers)


def valley_is_absent(main: Outcome, control: Outcome, accuracy: float) -> Outcome:
    """H4 and H6: a control shows no valley. Where the main run has none either, this says nothing of what makes one."""
    verdict = {CONFIRMED: REFUTED, REFUTED: CONFIRMED}.get(control.verdict, UNDETERMINED)
    if verdict == CONFIRMED and main.verdict != CONFIRMED:
        verdict = "confirmed by the letter, but the main run has no valley either"
    return Outcome(verdict, f"{control.numbers}; the control answers {accuracy:.0%} of one and two hops")


def _signed(values: np.ndarray, images: np.ndarray, unit: str, wanted: int) -> Outcome:
    low, high = limits(values[:, None], images, 0.975, lambda mean: mean[0])
    verdict = CONFIRMED if wanted * (low if wanted > 0 else high) > 0 else UNDETERMINED
    if wanted * (high if wanted > 0 else low) < 0:
        verdict = REFUTED
    return Outcome(verdict, f"{values.mean():+.2f} [{low:+.2f}, {high:+.2f}] {unit}, {len(np.unique(images))} images")


def depth_by_hops(samples: pd.DataFrame) -> Outcome:
    """H5: the slope of the exit depth over one to four hops, paired within a scene's walked questions."""
    samples = samples[samples["part"] == "questions"]
    hops = {"attribute": 1, "neighbor": 2, "two_hop": 3, "three_hop": 4}
    wide = samples.assign(hops=samples["kind"].map(hops)).pivot_table(
        index="image_id", columns="hops", values="exit_depth"
    )
    wide = wide.dropna()
    centred = np.array(sorted(hops.values())) - 2.5
    slopes = (wide.to_numpy() * centred).sum(1) / (centred**2).sum()
    means = ", ".join(f"{number} hops {mean:.1f}" for number, mean in wide.mean().items())
    outcome = _signed(slopes, wide.index.to_numpy(), "layers a hop", 1)
    return Outcome(outcome.verdict, f"{outcome.numbers}; mean depth: {means}")


def recall_order(samples: pd.DataFrame) -> Outcome:
    """H8b: the exit depth of `look_recall` minus that of `recall_look`, paired over scenes."""
    samples = samples[samples["kind"].isin(["look_recall", "recall_look"])]
    wide = samples.pivot_table(index="image_id", columns="kind", values="exit_depth").dropna()
    difference = (wide["look_recall"] - wide["recall_look"]).to_numpy()
    return _signed(difference, wide.index.to_numpy(), "layers (look_recall minus recall_look)", -1)


def read_cuts(run: Path) -> pd.DataFrame:
    """A knock-out run's losses in points (0 or 100) of the questions with an image, with `image_id` and `kind`."""
    samples = pd.read_parquet(run / "samples.parquet").query("visual_tokens > 0")
    cuts = pd.read_parquet(run / "knockouts.parquet").merge(samples[["id", "image_id", "kind"]], on="id")
    return cuts.assign(loss=100.0 * (1 - cuts["agree"].astype(float)))


def middle_of_the_image(cuts: pd.DataFrame) -> Outcome:
    """H2: the largest loss of a window within the middle layers, minus the largest of all other windows."""
    wide = cuts[cuts["name"] == "visual->visual"].pivot_table(
        index=["image_id", "id"], columns=["start", "stop"], values="loss"
    )
    windows = list(wide.columns)
    inside = np.array([start >= SPLIT[0] and stop <= SPLIT[1] for start, stop in windows])

    def lead(curve: np.ndarray) -> float:
        return float(curve[inside].max() - curve[~inside].max())

    values, images = wide.to_numpy(), wide.index.get_level_values("image_id").to_numpy()
    low, high = limits(values, images, 0.975, lead)
    mean = values.mean(0)
    best = [windows[int(np.flatnonzero(side)[mean[side].argmax()])] for side in (inside, ~inside)]
    verdict = CONFIRMED if low > 0 else REFUTED if high < 0 else UNDETERMINED
    told = "; ".join(
        f"{name} most at layers {start}-{stop - 1}: {mean[windows.index((start, stop))]:.1f} points"
        for name, (start, stop) in zip(("within", "elsewhere"), best, strict=True)
    )
    return Outcome(verdict, f"{lead(mean):+.1f} [{low:+.1f}, {high:+.1f}] points ({told}), {len(set(images))} images")


def late_use(cuts: pd.DataFrame) -> Outcome:
    """H3: what it costs to cut the instruction off the image in the last ten layers."""
    share, low, high = (
        100 * each for each in share_interval(cuts["loss"].to_numpy() / 100, cuts["image_id"].to_numpy())
    )
    verdict = CONFIRMED if low > LATE_COST else REFUTED if high <= LATE_COST else UNDETERMINED
    return Outcome(verdict, f"{share:.1f} [{low:.1f}, {high:.1f}] points, {cuts['image_id'].nunique()} images")


def late_entry(cuts: pd.DataFrame) -> Outcome:
    """H8a: what late entry of the image costs `look_recall` more than `recall_look`, paired over scenes."""
    wide = cuts.pivot_table(index="image_id", columns="kind", values="loss").dropna()
    difference = (wide["look_recall"] - wide["recall_look"]).to_numpy()
    outcome = _signed(difference, wide.index.to_numpy(), "points (look_recall minus recall_look)", 1)
    return Outcome(outcome.verdict, f"{outcome.numbers}; " + ", ".join(f"{k} {v:.1f}" for k, v in wide.mean().items()))


def status_withheld(summary: Mapping[str, Any]) -> Outcome:
    """H7: what a status from a run that never saw the image does to the gates' mean exit probability."""
    (tests,) = summary["tests"].values()
    change = tests["withheld"]
    verdict = CONFIRMED if change["high"] < 0 else REFUTED if change["low"] > 0 else UNDETERMINED
    numbers = f"{change['value']:+.3f} [{change['low']:+.3f}, {change['high']:+.3f}], {summary['images']} images"
    if tests["trained_on"]:
        numbers += f"; the gates were trained on such statuses ({', '.join(tests['trained_on'])})"
    return Outcome(verdict, numbers)


def valleys_beside() -> dict[str, Outcome]:
    """H1's rule, applied to every training beside the main one whose attention was run."""
    layers = {name: stages_of(name) / "layers.parquet" for name in (*SEEDS, UNTRAINED, PROJECTOR)}
    return {name: valley(pd.read_parquet(file)) for name, file in layers.items() if file.is_file()}


def decide() -> dict[str, Outcome]:
    """Every hypothesis with what can be said of it today."""
    missing = Outcome(OPEN, "its runs are missing")
    found = dict.fromkeys(("H1", "H2", "H3", "H4", "H5", "H6", "H7", "H8a", "H8b"), missing)
    evaluation = Path("docs/testbed_smol/evaluation.json")
    accuracy = (
        json.loads(evaluation.read_text())["accuracy"]["known"]["bar"]["accuracy"] if evaluation.is_file() else 0.0
    )
    if accuracy < LEAST_ACCURACY:
        weak = Outcome("not decided", f"the model answers {accuracy:.0%} of the one- and two-hop image questions")
        return dict.fromkeys(found, weak)
    if (STAGES / "layers.parquet").is_file():
        found["H1"] = valley(pd.read_parquet(STAGES / "layers.parquet"))
        controls, valleys = json.loads(CONTROLS.read_text()) if CONTROLS.is_file() else {}, valleys_beside()
        for name, control in (("H4", UNTRAINED), ("H6", PROJECTOR)):
            if control in valleys and control in controls:
                right = controls[control]["accuracy"]["bar"]["accuracy"]
                found[name] = valley_is_absent(found["H1"], valleys[control], right)
        found["H1"] = valley_in_all(found["H1"], {name: valleys[name] for name in SEEDS if name in valleys})
    if (WALKED / "samples.parquet").is_file():
        found["H5"] = depth_by_hops(pd.read_parquet(WALKED / "samples.parquet"))
    if (RECALL / "samples.parquet").is_file():
        found["H8b"] = recall_order(pd.read_parquet(RECALL / "samples.parquet"))
    rules = {"H2": (CUTS, middle_of_the_image), "H3": (LATE, late_use), "H8a": (RECALL_CUTS, late_entry)}
    for name, (run, rule) in rules.items():
        if (run / "summary.json").is_file():
            found[name] = rule(read_cuts(run))
    if (GATES / "summary.json").is_file():
        found["H7"] = status_withheld(json.loads((GATES / "summary.json").read_text()))
    return found


def findings_figure() -> Any:
    """Attention on the image and what leaving early costs, layer by layer, on one axis of layers."""
    stages, exits = (json.loads((run / "summary.json").read_text()) for run in (STAGES, EXITS))
    attention = Band.from_dict(stages["bands"][stages["endpoint"]]["cross"])
    agreement = Band.from_dict(exits["overall"]["bands"]["agreement"])
    with plots.figure_style():
        figure, (top, bottom) = plt.subplots(2, 1, figsize=(6.4, 4.6), sharex=True)
        plots.draw_band(top, attention, plots.CYCLE[0])
        top.axhline(1, color="0.6", linewidth=0.8)
        top.set(ylabel="attention on the image\n(enrichment over uniform)", ylim=(0, None))
        plots.draw_band(bottom, agreement, plots.CYCLE[1])
        bottom.set(
            xlabel="decoder layer; exit layer k",
            ylabel="answers kept if the\nimage leaves after k layers",
            ylim=(0, 1.02),
        )
        for axis in (top, bottom):
            for border in SPLIT:
                axis.axvline(border, color="0.8", linewidth=0.8)
        figure.suptitle(
            f"llava_smol, {exits['num_samples']} questions, 95% bands; grey lines: the registered split",
            fontsize="medium",
        )
        figure.tight_layout()
    return figure


def first_picture() -> tuple[Any, str]:
    """What README.md shows first, and what it says in words, from the runs of attention, exits and gates."""
    stages, exits, gated = (json.loads((run / "summary.json").read_text()) for run in (STAGES, EXITS, GATED))
    settled = exits["findings"]["contribution_stops"]["details"]["changed_answers"]["estimate"]
    kept = exits["agreement"]
    numbers = {
        "stages.png": {"curves": stages["curves"]},
        "exits.png": {"agreement": kept, "findings.contribution_stops.exit_layer": settled},
        "exit_examples.png": {"exit_layers": gated["exit_layers"]},
    }
    caption = (
        f"`llava_smol`, a LLaVA on a pretrained language model of {exits['num_layers']} layers, "
        f"{exits['num_questions']} questions about drawn scenes ([what else came out](docs/findings_smol.md)). "
    )
    if settled is None:
        return draw_hero(numbers), caption + "Its answers change whichever layer the image leaves at."
    return draw_hero(numbers), caption + (
        f"Its answers need the image up to layer {settled}: {min(kept[settled:]):.0%} of them hold without it from "
        f"there on, {kept[settled - 4]:.0%} if it leaves four layers before. Gates trained on a thousand questions let "
        f"it go in {1 - gated['exit_layers'][-1] / gated['num_questions']:.0%} of others."
    )


def exits_by_need(answers: pd.DataFrame) -> dict[str, float]:
    """Mean exit layer of the gates for questions that need no image, and for those that do."""
    needs = answers["kind"].isin(IMAGE_KINDS)
    layers = answers["exit_layer"]
    return {"without": float(layers[~needs].mean()), "with": float(layers[needs].mean())}


def main() -> None:
    """Apply the rules and write the page."""
    found = decide()
    commands = COMMANDS | CONTROL_COMMANDS
    runs = {run: json.loads((run / "summary.json").read_text()) for run in commands if (run / "summary.json").is_file()}
    if {STAGES, EXITS} <= runs.keys():
        figure = findings_figure()
        write_atomic(FIGURES / "layers.png", lambda out: figure.savefig(out, format="png", metadata={"Software": None}))
    if {STAGES, EXITS, GATED} <= runs.keys():
        picture, caption = first_picture()
        drawn = io.BytesIO()
        picture.savefig(drawn, format="png", dpi=160, metadata={"Software": None})
        write_generated(FIGURES / "hero.png", drawn.getvalue(), COMMAND)
        write_generated("README.md", f"![{ALT}]({FIGURES / 'hero.png'})\n\n*{caption}*", COMMAND, section=SECTION)
    gated = runs.get(GATED)
    if gated is not None:
        gated = {**gated, "exits": exits_by_need(pd.read_parquet(GATED / "answers.parquet"))}
    if LENS in runs:
        shutil.copyfile(LENS / "figures/patches.png", FIGURES / "patches.png")
    controls = json.loads(CONTROLS.read_text()) if CONTROLS.is_file() else {}
    template = Environment(undefined=StrictUndefined, keep_trailing_newline=True).from_string(TEMPLATE.read_text())
    page = template.render(
        found=found,
        titles=TITLES,
        commands=[commands[run].format(n=summary["num_samples"]) for run, summary in runs.items()],
        cell=lambda rate: f"{rate['accuracy']:.3f} [{rate['low']:.3f}, {rate['high']:.3f}]",
        controls=dict(
            sorted(controls.items(), key=lambda each: ORDER.index(each[0]) if each[0] in ORDER else len(ORDER))
        ),
        stages=runs.get(STAGES),
        exits=runs.get(EXITS),
        gated=gated,
        seeds={name: each.verdict for name, each in valleys_beside().items() if name in SEEDS},
        trail=json.loads(TRAIL.read_text()) if TRAIL.is_file() else [],
        lens=outline(runs[LENS]) if LENS in runs else [],
        methods=comparison_section(record(runs[METHODS])) if METHODS in runs else None,
    )
    write_atomic(PAGE, lambda out: out.write(page.encode()))
    for name, outcome in found.items():
        print(f"{name:4} {outcome.verdict}: {outcome.numbers}")


if __name__ == "__main__":
    main()
