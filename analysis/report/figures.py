"""The figures of a report, left by runs or drawn from their tables, and each in words for who does not see it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from omegaconf import OmegaConf
from PIL import Image

from dyvte.data import build_dataset
from dyvte.errors import DyvteError, RunFolderError
from dyvte.runs.store import RunFolder

from ..measuring.attention import map_name
from ..plots.attention import frame_in_words
from ..plots.exits import draw_policy_exit_layers
from ..plots.policies import (
    draw_exit_examples,
    draw_gate_curves,
    draw_policies_against_fixed_exits,
    first_exit_examples,
)
from ..plots.style import Summary, data_url, figure_style
from ..statistics.verdicts import verdict_in_words, verdict_word
from .cells import policy_label, spaced, written
from .runs import FinishedRun, known_values


@dataclass(frozen=True)
class PageFigure:
    """An image in the page, as a `data:` address: in words what it shows (`alt`) and how to read it (`caption`)."""

    source: str
    alt: str
    caption: str
    width: int
    height: int

    @property
    def wide(self) -> bool:
        """Whether it needs the page's width to be read: a figure of several panels side by side."""
        return self.width > 1200 or self.width > 1.7 * self.height

    @classmethod
    def of(cls, file: Path, alt: str, caption: str) -> PageFigure:
        """From a PNG file."""
        with Image.open(file) as image:
            return cls(data_url(file.read_bytes()), alt, caption, *image.size)


STILLS = ("map_", "grid_")
"""Beginnings of the names of figures of single samples."""


def figures_of(run: FinishedRun) -> list[PageFigure]:
    """The figures in the folder of a run but its stills, those that `DESCRIPTIONS` knows first and in its order."""
    order = [name for step, name in DESCRIPTIONS if step == run.step]
    files = [file for file in run.figures() if not file.stem.startswith(STILLS)]
    files.sort(key=lambda file: order.index(file.stem) if file.stem in order else len(order))
    return [PageFigure.of(file, *describe_figure(run, file.stem)) for file in files]


def stills_of(run: FinishedRun) -> list[PageFigure]:
    """The figures of single samples in the folder of a run."""
    files = [file for file in run.figures() if file.stem.startswith(STILLS)]
    return [PageFigure.of(file, *describe_figure(run, file.stem)) for file in files]


def describe_figure(run: FinishedRun, name: str) -> tuple[str, str]:
    """Alternative text and caption of a figure."""
    if name.startswith("map_"):
        record = next((each for each in run.value("/maps") or [] if name == map_name(each)), None)
        return _map(record), "The same as a still picture, every layer at once."
    if name.startswith("grid_"):
        return _unknown(run.summary), "The word that each patch says after some layers."
    description, caption = DESCRIPTIONS.get((run.step, name), (_unknown, ""))
    return description(run.summary), caption


Drawn = tuple[str, Figure, str, str]
"""Name, figure, alternative text, caption."""


def keep_figure(folder: RunFolder, name: str, figure: Figure, alt: str, caption: str) -> PageFigure:
    """Save a figure that was drawn for the page beside it, and put it into the page."""
    with figure_style():
        path = folder.save_figure(name, figure)
    return PageFigure.of(path, alt, caption)


def figures_of_step(step: str, runs: Sequence[FinishedRun], folder: RunFolder) -> list[PageFigure]:
    """What is drawn of the runs of a step; nothing for steps that leave figures themselves."""
    drawn = {"train": _draw_gates, "evaluate": _draw_policies}
    return [keep_figure(folder, *each) for each in drawn[step](runs)] if step in drawn else []


def _draw_gates(runs: Sequence[FinishedRun]) -> Iterator[Drawn]:
    for run in runs:
        title = f"{run.value('/model')}, gates trained on {run.value('/data')}"
        figure = draw_gate_curves(RunFolder(run.path).read_table("layers"), title)
        yield f"gates_{run.path.name}", figure, *describe_figure(run, "gates")


def _draw_policies(runs: Sequence[FinishedRun]) -> Iterator[Drawn]:
    """Accuracy against cost, then for each policy with gates where questions left, with some of them."""
    for folder in dict.fromkeys(run.path.parent for run in runs):
        try:
            figure = draw_policies_against_fixed_exits(folder)
        except RunFolderError:  # these runs are not compared there
            continue
        points = [
            f"{policy_label(run.value('/policy'))} {written(run.value('/accuracy'), 'share')} right and "
            f"{written(run.value('/agreement'), 'share')} unchanged at {written(run.value('/cost'), 'ratio')}"
            for run in runs
            if run.path.parent == folder
        ]
        yield (
            "policies",
            figure,
            "Two plots of accuracy, and of agreement with the full model, against decoder FLOPs (full model = 1): a "
            f"curve of fixed exits, and one point a policy: {'; '.join(points)}.",
            "Each policy beside every fixed exit (numbered) and the cheapest exit chosen with hindsight (star).",
        )
    for run in runs:
        if sum(1 for each in run.value("/exit_layers") or [] if each) > 1:
            figure = draw_policy_exit_layers(run.summary)
            yield f"exit_layers_{run.path.name}", figure, *describe_figure(run, "exit_layers")
            yield from _draw_examples(run)


def _draw_examples(run: FinishedRun) -> Iterator[Drawn]:
    samples = RunFolder(run.path).read_table("samples")
    try:
        dataset = build_dataset(OmegaConf.create(run.config["data"]), stored=True)
        examples = first_exit_examples(samples, dataset, images=4)
    except (DyvteError, KeyError):  # the data have moved since; the tables stay
        return
    if not examples:
        return
    title = f"{run.value('/model')} on {run.value('/data')}: {policy_label(run.value('/policy'))}"
    lines = [
        f"“{row['question']}” answered “{row['answer']}”, image left after {row['exit_layer']} layers"
        for example in examples
        for row in example.questions.to_dict("records")
    ]
    yield (
        f"examples_{run.path.name}",
        draw_exit_examples(examples, run.summary["num_layers"], title),
        f"Images with questions and how many layers saw the image: {'; '.join(lines)}.",
        "The first images of the data: dark, layers that see the image; light, layers that run on the text alone.",
    )


# ------------------------------------------------------------------------ words


def course(name: str, values: Sequence[Any], unit: str = "plain", where: str = "layer") -> str:
    """How a curve runs, in a sentence: its ends and its extremes."""
    known = known_values(values)
    if not known:
        return f"{name}: no values"
    (first, start), (last, end) = known[0], known[-1]
    low, high = min(known, key=lambda each: each[1]), max(known, key=lambda each: each[1])
    text = f"{name}: {written(start, unit)} in {where} {first}, {written(end, unit)} in {where} {last}"
    extremes = [
        f"{word} {written(value, unit)} in {where} {index}"
        for word, (index, value) in (("lowest", low), ("highest", high))
        if index not in (first, last)
    ]
    return text + "".join(f", {each}" for each in extremes)


def courses(curves: Mapping[str, Sequence[Any]], unit: str = "plain", where: str = "layer") -> str:
    """How several curves run."""
    return "; ".join(course(name, values, unit, where) for name, values in curves.items())


CURVE_NAMES = {"cross": "question to image", "visual": "image to image", "text": "question to text"}


def _stages(summary: Summary) -> str:
    curves = {CURVE_NAMES[name]: values for name, values in summary["curves"].items()}
    return (
        f"Line plot over {summary['num_layers']} layers of attention relative to evenly spread attention, without the "
        f"sink. {courses(curves)}. {verdict_in_words(summary['stages'])}"
    )


def _measures(summary: Summary) -> str:
    mass = summary["bands"]["mass"]["cross"]["mean"]
    return (
        f"Six line plots over {summary['num_layers']} layers: attention mass, mean score per allowed pair and "
        f"enrichment, with and without the attention sink. {course('Mass from question to image', mass, 'share')}."
    )


def _kinds_of_stages(summary: Summary) -> str:
    endpoint = summary["endpoint"]
    curves = {spaced(kind): each["bands"][endpoint]["cross"]["mean"] for kind, each in summary["kinds"].items()}
    return f"One line plot for each question kind. Attention from question to image: {courses(curves)}."


def _exits(summary: Summary) -> str:
    curves = {"Same answer as the full model": summary["agreement"], "right answer": summary["accuracy"]}
    share = summary["flops_decoder"][0] / summary["flops_decoder"][-1]
    return (
        f"Line plot over the exit layers 0 to {summary['num_layers']}. {courses(curves, 'share', 'exit layer')}. FLOPs "
        f"rise in a straight line from {share:.0%} of the full model's to all of it."
    )


def _kinds_of_exits(summary: Summary) -> str:
    curves = {spaced(kind): each["agreement"] for kind, each in summary["kinds"].items()}
    lines = courses(curves, "share", "exit layer")
    return f"One line plot for each question kind. Same answer as the full model: {lines}."


def _kl(summary: Summary) -> str:
    found = [
        f"η = {each['eta']:g}: " + ("no exit" if each["layer"] is None else f"K* = {each['layer']}")
        for each in summary["k_star_details"]
    ]
    divergence = course("KL divergence from the full model in nats", summary["kl"], "nats", "exit layer")
    return f"Line plot on a logarithmic scale. {divergence}. {', '.join(found)}."


def _entropy(summary: Summary) -> str:
    full = summary["entropy"]["text_entropy"]["matrix"]["mean"][-1]
    return (
        "Left, a line plot of the entropy of text self-attention over layers under some exits; right, a map of its "
        f"change under every exit. {course('Full model, in nats', full)}."
    )


def _entropy_change(summary: Summary) -> str:
    change = summary["entropy_change"]["signed"]["mean"]
    signed = course("Change in nats, mean over the layers after the exit", change, "nats", "exit layer")
    return f"Two line plots over exit layers. {signed}. Right, its correlation with changed answers."


def _exit_depth(summary: Summary) -> str:
    groups = {**summary["kinds"], "all": summary["overall"]}
    means = [f"{spaced(kind)} {each['exit_depth']['mean']:.1f}" for kind, each in groups.items()]
    return f"Map of the share of questions at each exit depth, one row a question kind. Means: {', '.join(means)}."


def _tokens(summary: Summary) -> str:
    curves = {part: values["mean"] for part, values in summary["tokens"].items() if "token" in values}
    lines = courses(curves, "layer", "token")
    return f"Line plot of the exit layer from which each answer token is predicted. {lines}."


def _gates(summary: Summary) -> str:
    return (
        "Line plot over exit layers, for the gate that decides on each: how often the label and the gate say exit, and "
        f"its precision and recall. Together the gates keep {written(summary['agreement'], 'share')} of the held-out "
        f"answers at {written(summary['cost'], 'share')} of the decoder's FLOPs."
    )


def _exit_layers(summary: Summary) -> str:
    means = [f"{spaced(kind)} {each['mean_exit_layer']:.1f}" for kind, each in summary["kinds"].items()]
    return (
        f"Map of the share of questions at each exit layer under {policy_label(summary['policy'])}, one row a question "
        f"kind. Mean exit layers: {', '.join(means)}; all {summary['mean_exit_layer']:.1f}."
    )


def _cost(summary: Summary) -> str:
    rows = [
        f"{policy_label(row['method'])} {written(row['accuracy'], 'share')} at {row['cost']:.2f}"
        for row in summary["rows"]
        if "accuracy" in row
    ]
    return f"Accuracy against decoder FLOPs (full model = 1), one line a method: {', '.join(rows)}."


def _map(record: Summary | None) -> str:
    if record is None:
        return "Attention maps over an image, one a layer."
    shown = frame_in_words(record) or "an image"
    token = f", for its token “{record['token']}”" if "token" in record else ""
    return (
        f"Attention maps over {shown}, one a layer, for the question “{record['question']}”, answered "
        f"“{record['answer']}”{token}. {course('Share of attention on it', record['mass'], 'share')}."
    )


def _frames(summary: Summary) -> str:
    words = summary["frames"]["in_words"]
    return f"Map of frames over layers, each frame's share of the attention on the video: {words}."


def _cuts(summary: Summary) -> str:
    effects = summary["overall"]["effects"].items()
    curves = {name.replace("->", " to "): effect["agreement_points"]["mean"] for name, effect in effects}
    lines = courses(curves, where="window")
    return f"Line plot over windows of layers, one line a path. Change in answers, in points: {lines}."


def _stage_table(summary: Summary) -> str:
    rows = [
        f"{row['stage']} {verdict_word(row['by_attention'])} by attention, {verdict_word(row['by_cause'])} by cause"
        for row in summary["rows"]
    ]
    return f"Table of the stages: {'; '.join(rows)}."


def _answer_lens(summary: Summary) -> str:
    curves = {f"{name} lens": each["is_answer"]["mean"] for name, each in summary["answer"].items()}
    return f"Line plot over layers of how often the answer is the likeliest token: {courses(curves, 'share')}."


def _unknown(summary: Summary) -> str:
    return f"A figure of this run of {summary['model']} on {summary['data']}; the tables hold its numbers."


BY_KIND = "The same for each kind of question."
DESCRIPTIONS: dict[tuple[str, str], tuple[Callable[[Summary], str], str]] = {
    ("stages", "stages"): (
        _stages,
        "How much the question looks at the image, and each at itself, layer by layer, relative to attention spread "
        "evenly (1). Bands: 95%, bootstrap over images.",
    ),
    ("stages", "measures"): (
        _measures,
        "Three ways to count the same attention, with and without the first token of the sequence, where much of it "
        "goes for no reason of content.",
    ),
    ("stages", "kinds"): (_kinds_of_stages, BY_KIND),
    ("stages", "frames"): (
        _frames,
        "How the attention of the prompt's last token on the video is shared out among its frames, layer by layer.",
    ),
    ("exits", "exits"): (
        _exits,
        "What becomes of the answers if the image leaves before layer k, and what the prefill then costs.",
    ),
    ("exits", "kinds"): (_kinds_of_exits, BY_KIND),
    ("exits", "kl"): (
        _kl,
        "How far the prediction of the next token moves from the full model's; dashed: thresholds η and the first exit "
        "K* that meets them.",
    ),
    ("exits", "entropy"): (
        _entropy,
        "How the attention among the text changes after an exit, against the full model.",
    ),
    ("exits", "entropy_change"): (
        _entropy_change,
        "Which way the entropy of the text's attention moves after an exit, how far another image moves it, and "
        "whether questions whose entropy moves are those whose answers change.",
    ),
    ("exits", "exit_depth"): (
        _exit_depth,
        "First exit layer from which each question keeps its answer and that answer's cross-entropy (at most 1.03 "
        "times the full model's); diamonds: means with 95% intervals.",
    ),
    ("exits", "tokens"): (_tokens, "How long each token of an answer needs the image."),
    ("knockout", "knockout"): (
        _cuts,
        "What the answers lose when a path through attention is cut in a window of layers. Bands: 95%, bootstrap over "
        "images.",
    ),
    ("knockout", "entry_exit"): (
        _unknown,
        "The image enters at one layer and leaves at another: answers that stay, for every pair.",
    ),
    ("knockout", "kinds"): (_cuts, BY_KIND),
    ("stage_table", "stage_table"): (_stage_table, "Each stage by attention and by cause, with the numbers behind it."),
    ("lens", "answer"): (_answer_lens, "After which layer the answer can be read at the prompt's end."),
    ("lens", "patches"): (_unknown, "How often patches of an object name it, beside chance."),
    ("train", "gates"): (
        _gates,
        "What the gate after each layer has learnt, measured on images that it was not trained on.",
    ),
    ("evaluate", "exit_layers"): (_exit_layers, "Where the questions of each kind left under this policy."),
    ("tables", "accuracy_against_cost"): (
        _cost,
        "Every method at the same cost, on all questions and on those that need the image. Bars: 95%, bootstrap over "
        "images.",
    ),
}
"""(step, figure) -> its words, and its caption."""
