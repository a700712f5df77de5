"""One HTML file that shows what the runs of a model found: `python -m analysis.report` (docs/how_to_report.md).

It reads the run folders of the other commands, looks at a few samples with the model, and writes `report.html`, which
holds all its figures and loads nothing. Several models side by side: `'compare=[llava7b,llava13b]'`.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf

from dyvte.data import build_dataset
from dyvte.errors import ConfigError, DyvteError, RunFolderError
from dyvte.loading import SHIPPED_MODELS
from dyvte.runs.config import command, compose
from dyvte.runs.store import RunFolder, versions, write_atomic, write_json

from ..plots import compare as plots_compare
from ..plots import paper as plots_paper
from ..plots.attention import style
from .figures import Picture, course, describe, pictures
from .findings import findings, policy_label, written
from .page import Missing, Page, Section, render, verdict_table
from .runs import STEPS, Run, disagreements, find_runs, first_command, other_commands
from .samples import look
from .tables import BANDED, Cell, Table, banded, number, policies, tables, words

PAGE = "report.html"
COMPARED = ("stages", "exits", "evaluate")
"""Steps whose results are put side by side."""


@command("report")
def main(cfg: DictConfig) -> None:
    """Write the page that `conf/report.yaml` describes."""
    report(cfg)


def report(cfg: DictConfig) -> Path:
    """Read, draw, write. Returns the page.

    Raises:
        ConfigError: no run of the models is finished, or a setting is not possible.
        RunFolderError: a run folder cannot be read.
    """
    models = list(dict.fromkeys(str(each) for each in cfg.compare))
    if models == [cfg.model.name]:
        found = {cfg.model.name: find_runs(_patterns(cfg, cfg.model.name))}
    elif len(models) > 1:
        patterns = {model: _patterns(cfg, model) for model in models}
        found = {model: find_runs({step: each[step] for step in COMPARED}) for model, each in patterns.items()}
    else:
        raise ConfigError(f"compare={models}: give two models or more, or model={models[0] if models else 'NAME'}")
    folder = RunFolder(Path(cfg.output_dir))
    with other_commands():  # what a run's command was follows from the configurations of the commands
        missing = [each for model, (runs, stopped) in found.items() for each in _missing(cfg, model, runs, stopped)]
        if not any(runs for runs, _ in found.values()):
            where = _patterns(cfg, models[0])["stages"]
            raise ConfigError(
                f"no finished run of {models[0]} in {where} or beside it: start with {missing[0].command}"
            )
        folder.path.mkdir(parents=True, exist_ok=True)
        if len(models) == 1:
            page = one_model(cfg, found[models[0]][0], missing, folder)
        else:
            page = several_models(cfg, {model: runs for model, (runs, _) in found.items()}, missing, folder)
        html = render(page)
    path = folder.path / PAGE
    write_atomic(path, lambda out: out.write(html.encode()))
    write_json(folder.path / "summary.json", _summary(cfg, page))
    for each in missing:
        print(f"not there: {each.name} ({each.gives}); {each.command}")
    for warning in page.warnings:
        print(f"warning: {warning}")
    print(f"report: {path} ({len(html) / 1e6:.1f} MB, opens without a network)")
    return path


def _patterns(cfg: DictConfig, model: str) -> dict[str, str]:
    """Folders of the runs of a model."""
    named: Any = OmegaConf.merge(cfg, {"model": {"name": model}})
    return {step.name: str(named.runs[step.name]) for step in STEPS}


def _missing(
    cfg: DictConfig, model: str, runs: Sequence[Run], unfinished: Mapping[str, Sequence[Path]]
) -> Iterator[Missing]:
    done, given = {run.step for run in runs}, _chosen(cfg, model)
    for step in STEPS if len(cfg.compare) == 1 else (step for step in STEPS if step.name in COMPARED):
        stopped = [str(path) for path in unfinished.get(step.name, ())]
        if step.name not in done or stopped:
            name = step.name if len(cfg.compare) == 1 else f"{step.name} of {model}"
            yield Missing(name, step.gives, first_command(step, given), stopped)


def _given() -> list[str]:
    """The overrides that this command was given."""
    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


def _chosen(cfg: DictConfig, model: str) -> list[str]:
    """Overrides that choose a model of this page and its data, ready for a shell."""
    given = [each for each in _given() if re.match(r"data[.=]", each)]
    if len(cfg.compare) == 1 and HydraConfig.initialized():
        given = [each for each in _given() if re.match(r"(model|data)[.=]", each)]
    elif model != compose("report").model.name:
        given.insert(0, f"model={model}")
    return [shlex.quote(each) for each in given]


def _summary(cfg: DictConfig, page: Page) -> dict[str, Any]:
    return {
        "model": list(cfg.compare) if len(cfg.compare) > 1 else cfg.model.name,
        "data": cfg.data.name,
        "runs": {run.name: str(run.path) for run in page.runs},
        "missing": [each.name for each in page.missing],
        "warnings": page.warnings,
        "samples": [] if page.samples is None else [record["id"] for record in page.samples.records],
        "versions": versions(),
    }


def _own_command(cfg: DictConfig) -> str:
    return " ".join(["python -m analysis.report", *map(shlex.quote, _given())])


# --------------------------------------------------------------------------- one model


def one_model(cfg: DictConfig, runs: list[Run], missing: list[Missing], folder: RunFolder) -> Page:
    """The page of one model."""
    warnings, samples = disagreements(runs), None
    if cfg.samples.count or cfg.samples.ids:
        try:
            samples = look(cfg, runs)
            warnings += samples.notes
        except ConfigError:
            raise
        except DyvteError as error:  # the numbers can be read without the model
            warnings.append(f"No sample images: {error}. (samples.count=0 leaves them out.)")
    return Page(
        title=f"{cfg.model.name} on {cfg.data.name}",
        lead=lead([cfg.model.name]),
        warnings=warnings,
        findings=findings(runs),
        owners={},
        samples=samples,
        sections=[section for section in _sections(runs, folder) if section.pictures or section.tables],
        runs=runs,
        missing=missing,
        command=_own_command(cfg),
    )


def lead(models: Sequence[str]) -> str:
    """What the page is about, and what a shipped model is no evidence for."""
    text = (
        "Where in the decoder the image matters to the answers: how attention runs between image and text, what "
        "happens when the visual tokens leave at exit layer k, and what policies that take them out cost and save."
    )
    if set(models) & set(SHIPPED_MODELS):
        shipped = ", ".join(each for each in models if each in SHIPPED_MODELS)
        text += f" {shipped} is the small model that ships with the toolkit, made to check it on: it is no evidence "
        text += "about larger models."
    return text


SECTIONS = {
    "stages": ("Attention, layer by layer", "How image and text attend to each other."),
    "exits": ("The image leaves at exit layer k", "Every exit layer, for all questions at once."),
    "train": ("Gates", "Small classifiers that decide after each layer whether the image is still needed."),
    "evaluate": ("Policies", "What was asked under each policy, beside fixed exits."),
    "tables": ("Methods at matched cost", "All methods on the same questions."),
    "cost": ("Measured cost", "Time and memory; these depend on the machine."),
}


def _sections(runs: Sequence[Run], folder: RunFolder) -> Iterator[Section]:
    for step, (title, text) in SECTIONS.items():
        own = [run for run in runs if run.step == step]
        if not own:
            continue
        maps = [file.stem for run in own for file in run.figures() if file.stem.startswith("map_")]
        shown = [each for run in own for each in pictures(run, leave_out=maps)]
        drawn = [_save(folder, *each) for each in DRAWN[step](own)] if step in DRAWN else []
        more = [
            Picture.of(file, *describe(run, file.stem)) for run in own for file in run.figures() if file.stem in maps
        ]
        of_runs = [table for run in own for table in tables(run)]
        if step == "evaluate":
            of_runs.insert(0, policies(own))
        yield Section(step, title, text, [*drawn, *shown], of_runs, more)


def _save(folder: RunFolder, name: str, figure: Figure, alt: str, caption: str) -> Picture:
    """Keep a figure that this command has drawn beside the page, and put it into it."""
    with style():
        path = folder.save_figure(name, figure)
    return Picture.of(path, alt, caption)


Drawn = tuple[str, Figure, str, str]


def _draw_gates(runs: Sequence[Run]) -> Iterator[Drawn]:
    for run in runs:
        figure = plots_paper.gate_report(
            RunFolder(run.path).read_table("layers"), f"{run.value('/model')}, gates trained on {run.value('/data')}"
        )
        yield f"gates_{run.path.name}", figure, *describe(run, "gates")


def _draw_policies(runs: Sequence[Run]) -> Iterator[Drawn]:
    """Accuracy against cost, then for each policy with gates where questions left, with some of them."""
    for folder in dict.fromkeys(run.path.parent for run in runs):
        try:
            figure = plots_paper.policies(folder)
        except RunFolderError:  # these runs are not compared there
            continue
        points = [
            f"{policy_label(str(run.value('/policy')))} {written(run.value('/accuracy'), 'share')} right and "
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
        if exit_layers_used(run) < 2:
            continue
        policy = run.path.name
        yield f"exit_layers_{policy}", plots_paper.exit_layers(run.summary), *describe(run, "exit_layers")
        yield from _draw_examples(run)


def exit_layers_used(run: Run) -> int:
    """How many different exit layers the questions of a run left at."""
    return sum(1 for each in run.value("/exit_layers") or [] if each)


def _draw_examples(run: Run) -> Iterator[Drawn]:
    samples = RunFolder(run.path).read_table("samples")
    try:
        dataset = build_dataset(OmegaConf.create(run.config["data"]))
        examples = plots_paper.exit_examples_of(samples, dataset, images=4)
    except (DyvteError, KeyError):  # the data have moved since; the tables stay
        return
    if not examples:
        return
    policy = policy_label(str(run.value("/policy")))
    title = f"{run.value('/model')} on {run.value('/data')}: {policy}"
    lines = [
        f"“{row['question']}” answered “{row['answer']}”, image left after {row['exit_layer']} layers"
        for example in examples
        for row in example.questions.to_dict("records")
    ]
    yield (
        f"examples_{run.path.name}",
        plots_paper.exit_examples(examples, run.summary["num_layers"], title),
        f"Images with questions and how many layers saw the image: {'; '.join(lines)}.",
        "The first images of the data: dark, layers that see the image; light, layers that run on the text alone.",
    )


DRAWN: dict[str, Callable[[Sequence[Run]], Iterator[Drawn]]] = {"train": _draw_gates, "evaluate": _draw_policies}


# ---------------------------------------------------------------------- several models


def several_models(cfg: DictConfig, found: Mapping[str, list[Run]], missing: list[Missing], folder: RunFolder) -> Page:
    """The page of several models: their numbers in shared tables, their figures next to each other."""
    named = {model: [replace(run, name=f"{model}/{run.name}") for run in runs] for model, runs in found.items()}
    runs = [run for step in COMPARED for own in named.values() for run in own if run.step == step]
    names = ", ".join(named)
    warnings = []
    for model, own in named.items():
        warnings += [f"{model}: {note}" for note in disagreements(own)]
    if len({run.data for run in runs if run.data}) > 1:
        warnings.append("The runs were not made on the same questions: compare their shapes, not their numbers.")
    sections = [
        section
        for section in (_stages_of_models(named, folder), _exits_of_models(named, folder), _policies_of_models(named))
        if section.pictures or section.tables or section.beside
    ]
    found_of_all = findings(runs)
    owners = {run.name: model for model, own in named.items() for run in own}
    return Page(
        title=f"{len(named)} models on {cfg.data.name}",
        lead=f"{names}. {lead(list(named))}",
        warnings=warnings,
        findings=found_of_all,
        owners=owners,
        samples=None,
        sections=sections,
        runs=runs,
        missing=missing,
        command=_own_command(cfg),
        verdicts=verdict_table(found_of_all, owners),
    )


def _beside(found: Mapping[str, list[Run]], step: str) -> list[tuple[str, list[Picture]]]:
    """The figures of a step that every model may have: for each its caption and one picture a model."""
    rows: dict[str, list[Picture]] = {}
    for model, runs in found.items():
        for run in runs:
            if run.step == step:
                maps = [file.stem for file in run.figures() if file.stem.startswith("map_")]
                for picture in pictures(run, leave_out=maps):
                    rows.setdefault(picture.caption, []).append(replace(picture, caption=model))
    return list(rows.items())


def _stages_of_models(found: Mapping[str, list[Run]], folder: RunFolder) -> Section:
    runs = {model: run for model, own in found.items() for run in own if run.step == "stages"}
    drawn = []
    if runs:
        figure = plots_paper.attention_scores([run.summary for run in runs.values()])
        lines = [
            f"{model}: " + course("question to image", run.summary["curves"].get("cross", []))
            for model, run in runs.items()
        ]
        alt = (
            "One column of line plots a model, over its layers: mean attention score per allowed pair, the same "
            "without the sink, and enrichment over evenly spread attention. Enrichment without the sink, "
            f"{'; '.join(lines)}."
        )
        caption = "Attention in each model (Fig. 2 of the DyVTE paper). Bands: 95%, bootstrap over images."
        drawn.append(_save(folder, "attention_scores", figure, alt, caption))
        figure = plots_compare.attention_by_depth({model: run.summary for model, run in runs.items()})
        alt = f"Line plot over relative depth, one line a model: enrichment without the sink. {'; '.join(lines)}."
        caption = "The same attention on the image, with all decoders stretched to one length."
        drawn.append(_save(folder, "attention_by_depth", figure, alt, caption))
    rows = []
    for model, run in runs.items():
        place = f"/bands/{run.value('/endpoint')}/cross"
        curve = [(value, layer) for layer, value in enumerate(run.value(f"{place}/mean") or []) if value is not None]
        ends = [banded(run, "plain", place, each[1]) for each in (min(curve), max(curve))] if curve else []
        stages = str(run.value("/stages/verdict")).replace("_", " ")
        starts = run.value("/stages/boundaries")
        rows.append(
            [
                words(model),
                number(run, "count", "/num_layers"),
                number(run, "count", "/num_samples"),
                words(stages),
                words("–" if starts is None else ", ".join(map(str, starts))),
                *(ends or [Cell("–")] * 2),
            ]
        )
    columns = ["model", "layers", "questions", "stages", "begin at", "lowest enrichment", "highest enrichment"]
    note = "Enrichment: attention of the question on the image over evenly spread attention, without the sink."
    title, text = SECTIONS["stages"]
    return Section(
        "stages", title, text, drawn, [Table("Models", columns, rows, note)], beside=_beside(found, "stages")
    )


def _exits_of_models(found: Mapping[str, list[Run]], folder: RunFolder) -> Section:
    runs = {model: run for model, own in found.items() for run in own if run.step == "exits"}
    drawn = []
    if runs:
        lines = [
            f"{model}: " + course("same answer", run.summary["agreement"], "share", "exit layer")
            for model, run in runs.items()
        ]
        drawn.append(
            _save(
                folder,
                "exits_by_depth",
                plots_compare.exits_by_depth({model: run.summary for model, run in runs.items()}),
                "Two line plots over the share of layers that see the image, one line a model: how many answers stay "
                f"the full model's, and how many are right. {'; '.join(lines)}.",
                "What becomes of the answers if the image leaves at this depth of each decoder.",
            )
        )
    rows = []
    for model, own in found.items():
        for run in own:
            if run.step == "exits":
                last = run.summary["num_layers"]
                finding = run.value("/findings/contribution_stops") or {}
                rows.append(
                    [
                        words(model),
                        number(run, "count", "/num_layers"),
                        banded(run, "share", "/overall/bands/accuracy", last),
                        banded(run, "share", "/overall/bands/accuracy", 0),
                        banded(run, "layer", "/overall/exit_depth"),
                        words(str(finding.get("verdict", "–")).replace("_", " ")),
                        number(run, "layer", "/findings/contribution_stops/exit_layer"),
                    ]
                )
    columns = [
        "model",
        "layers",
        "right, full model",
        "right, no image",
        "exit depth",
        "image stops contributing",
        "from k",
    ]
    shown = [Table("Models", columns, rows, BANDED)] if rows else []
    title, text = SECTIONS["exits"]
    return Section("exits", title, text, drawn, shown, beside=_beside(found, "exits"))


def _policies_of_models(found: Mapping[str, list[Run]]) -> Section:
    runs = {model: [run for run in own if run.step == "evaluate"] for model, own in found.items()}
    whole = [(model, policies(own)) for model, own in runs.items() if own]
    rows = [[words(model), *row] for model, table in whole for row in table.rows]
    title, text = SECTIONS["evaluate"]
    shown = [Table("Policies", ["model", *whole[0][1].columns], rows, whole[0][1].note)] if whole else []
    return Section("evaluate", title, text, tables=shown)


if __name__ == "__main__":
    main()
