"""One HTML file that shows what the runs of a model found: `python -m analysis.report` (docs/how_to_report.md).

It reads the run folders of the other commands, looks at a few samples with the model, and writes `report.html`, which
holds all its figures and loads nothing. Several models side by side: `'compare=[llava7b,llava13b]'`.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from dyvte.errors import ConfigError, DyvteError
from dyvte.loading import SHIPPED_MODELS
from dyvte.runs.config import command
from dyvte.runs.store import RunFolder, versions, write_atomic, write_json

from ..measuring.runs import read_summary
from .figures import figures_of, figures_of_step, stills_of
from .models import COMPARED_STEPS, owned_runs, sections_of_models
from .page import SECTIONS, MissingRun, Page, Section, opening_sentences, render_page
from .runs import REPORT_STEPS, FinishedRun, disagreements, find_runs, first_command
from .samples import look_at_samples
from .tables import policies_table, tables_of

REPORT_PAGE = "report.html"
ON = "@"
"""Between a model and its data, where those of an entry of `compare` are others than `data`."""
Found = tuple[list[FinishedRun], dict[str, list[Path]]]
"""Finished runs, and the folders of unfinished ones."""


@command("report")
def main(cfg: DictConfig) -> str:
    """Write the page that `conf/report.yaml` describes."""
    path = write_report(cfg)
    sentences = read_summary(path.parent)["opening"] or ["no run says yet what the model does with its image."]
    return f"{sentences[0]} Open {path} in a browser."


def write_report(cfg: DictConfig) -> Path:
    """Read, draw, write. Returns the page.

    Raises:
        ConfigError: no run of the models is finished, or a setting is not possible.
        RunFolderError: a run folder cannot be read.
    """
    models = list(dict.fromkeys(str(each) for each in cfg.compare))
    if len(models) < 2 and models != [cfg.model.name]:
        raise ConfigError(f"compare={models}: give two models or more, or model={models[0] if models else 'NAME'}")
    steps = [step.name for step in REPORT_STEPS] if len(models) == 1 else list(COMPARED_STEPS)
    patterns = {model: _patterns(cfg, model, steps) for model in models}
    found: dict[str, Found] = {model: find_runs(each) for model, each in patterns.items()}
    missing = [each for model, (runs, stopped) in found.items() for each in _missing(cfg, model, steps, runs, stopped)]
    if not any(runs for runs, _ in found.values()):
        where = patterns[models[0]]["stages"]
        raise ConfigError(f"no finished run of {models[0]} in {where} or beside it: start with {missing[0].command}")
    folder = RunFolder(Path(cfg.output_dir))
    folder.path.mkdir(parents=True, exist_ok=True)
    if len(models) == 1:
        page = page_of_one_model(cfg, found[models[0]][0], missing, folder)
    else:
        page = page_of_several_models(cfg, {model: runs for model, (runs, _) in found.items()}, missing, folder)
    html = render_page(page)
    path = folder.path / REPORT_PAGE
    write_atomic(path, lambda out: out.write(html.encode(errors="backslashreplace")))
    summary = {
        "model": models if len(models) > 1 else cfg.model.name,
        "data": cfg.data.name,
        "runs": {run.name: str(run.path) for run in page.runs},
        "missing": [each.name for each in missing],
        "warnings": page.warnings,
        "opening": page.opening,
        "samples": [] if page.samples is None else [record["id"] for record in page.samples.records],
        "versions": versions(),
    }
    write_json(folder.path / "summary.json", summary)
    for each in missing:
        print(f"not there: {each.name} ({each.gives}); {each.command}")
    for warning in page.warnings:
        print(f"warning: {warning}")
    print(f"report: {path} ({len(html) / 1e6:.1f} MB, opens without a network)")
    return path


def _patterns(cfg: DictConfig, model: str, steps: Sequence[str]) -> dict[str, str]:
    """Folders of the runs of a model, or of MODEL@DATA."""
    name, _, data = model.partition(ON)
    named: Any = OmegaConf.merge(cfg, {"model": {"name": name}, "data": {"name": data or cfg.data.name}})
    return {step: str(named.runs[step]) for step in steps}


def _missing(
    cfg: DictConfig,
    model: str,
    steps: Sequence[str],
    runs: Sequence[FinishedRun],
    unfinished: Mapping[str, Sequence[Path]],
) -> Iterator[MissingRun]:
    alone = len(cfg.compare) == 1
    name, _, data = model.partition(ON)
    settings = r"(model|data)[.=]" if alone else r"data[.=]"
    given = [shlex.quote(each) for each in _given() if not data and re.match(settings, each)]
    if not alone:
        given = [shlex.quote(f"{key}={value}") for key, value in (("model", name), ("data", data)) if value] + given
    done = {run.step for run in runs}
    for step in REPORT_STEPS:
        stopped = [str(path) for path in unfinished.get(step.name, ())]
        if step.name in steps and (step.name not in done or stopped):
            name = step.name if alone else f"{step.name} of {model}"
            yield MissingRun(name, step.gives, first_command(step, given), stopped)


def _given() -> list[str]:
    """The overrides that this command was given."""
    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


def _own_command() -> str:
    return " ".join(["python -m analysis.report", *map(shlex.quote, _given())])


def page_lead(models: Sequence[str]) -> str:
    """What the page is about, and what a shipped model is no evidence for."""
    text = (
        "Where in the decoder the image matters to the answers: how attention runs between image and text, what "
        "happens when the visual tokens leave at exit layer k, and what policies that take them out cost and save."
    )
    if shipped := [name for name in (model.partition(ON)[0] for model in models) if name in SHIPPED_MODELS]:
        text += (
            f" {', '.join(shipped)} is the small model that ships with the toolkit, made to check it on: it is no "
            "evidence about larger models."
        )
    return text


def page_of_one_model(cfg: DictConfig, runs: list[FinishedRun], missing: list[MissingRun], folder: RunFolder) -> Page:
    """The page of one model."""
    warnings, samples = disagreements(runs), None
    if cfg.samples.count or cfg.samples.ids:
        try:
            samples = look_at_samples(cfg, runs)
            warnings += samples.notes
        except ConfigError:
            raise
        except DyvteError as error:  # the numbers can be read without the model
            warnings.append(f"No sample images: {error}. (samples.count=0 leaves them out.)")
    return Page(
        title=f"{cfg.model.name} on {cfg.data.name}",
        lead=page_lead([cfg.model.name]),
        opening=opening_sentences(runs),
        warnings=warnings,
        sections=list(_sections(runs, folder)),
        runs=runs,
        missing=missing,
        command=_own_command(),
        samples=samples,
    )


def _sections(runs: Sequence[FinishedRun], folder: RunFolder) -> Iterator[Section]:
    for step in SECTIONS:
        own = [run for run in runs if run.step == step]
        shown = [each for run in own for each in figures_of(run)]
        stills = [each for run in own for each in stills_of(run)]
        tables = [table for run in own for table in tables_of(run)]
        if step == "evaluate" and own:
            tables.insert(0, policies_table(own))
        yield Section.of(step, [*figures_of_step(step, own, folder), *shown], tables, more=stills)


def page_of_several_models(
    cfg: DictConfig, found: Mapping[str, list[FinishedRun]], missing: list[MissingRun], folder: RunFolder
) -> Page:
    """The page of several models: their numbers in shared tables, their figures next to each other."""
    named = owned_runs(found)
    runs = [run for step in COMPARED_STEPS for own in named.values() for run in own if run.step == step]
    warnings = [f"{model}: {note}" for model, own in named.items() for note in disagreements(own)]
    if len({run.data for run in runs if run.data}) > 1:
        warnings.append("The runs were not made on the same questions: compare their shapes, not their numbers.")
    sentences = [f"{model}: {each}" for model, own in named.items() for each in opening_sentences(own)]
    return Page(
        title=" and ".join(model.replace(ON, " on ") for model in named)
        if any(ON in model for model in named)
        else f"{len(named)} models on {cfg.data.name}",
        lead=f"{', '.join(named)}. {page_lead(list(named))}",
        opening=sentences,
        warnings=warnings,
        sections=list(sections_of_models(named, folder)),
        runs=runs,
        missing=missing,
        command=_own_command(),
        owners={run.name: model for model, own in named.items() for run in own},
    )
