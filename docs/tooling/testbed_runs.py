"""Record what a training run of the testbed shows: ``python -m docs.tooling.testbed_runs run=outputs/testbed/main``.

Checkpoints are too large to keep, so their evidence is written to ``docs/testbed/runs/<name>.json``: the training log,
accuracy per kind on held-out questions, attention curves and the verdict on three stages after each training stage,
agreement under every exit, and linear probes of the decoder's input.
``python -m docs.tooling.testbed`` draws the documentation from these files.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn
from tqdm import tqdm

from analysis.statistics.bands import ImageBootstrap, mean_band, rate_band
from analysis.statistics.stages import stage_verdict
from benchmarks.common import machine
from docs.tooling.testbed_probes import probe_report
from dyvte.errors import ConfigError
from dyvte.instrument.attention import CURVES, AttentionProbe
from dyvte.instrument.sweep import exit_sweep
from dyvte.instrument.sweep.criteria import exit_depth
from dyvte.loading import wrap
from dyvte.mllm import MLLM
from dyvte.runs.config import command
from dyvte.runs.store import write_json
from dyvte.testbed.model import TestbedSizes, build_model
from dyvte.testbed.questions import IMAGE_KINDS, ShapesQuestions, ShapesRecord
from dyvte.testbed.tokenizer import build_processor
from dyvte.testbed.training.batches import STAGES, phases
from dyvte.testbed.training.loop import load_stages

MEASURES = ("mass", "enrichment_no_sink")


def stage_model(run: Path, cfg: DictConfig, last: str, vision: Path) -> MLLM:
    """The testbed as it stood after training stage ``last`` of a run; later stages are as initialised."""
    sizes = TestbedSizes(**OmegaConf.to_container(cfg.sizes))  # type: ignore[arg-type]
    model = build_model(sizes, cfg.seed)
    talk = nn.ModuleDict({"decoder": model.model.language_model, "lm_head": model.lm_head})
    parts: dict[str, nn.Module] = {
        "tower": model.model.vision_tower,
        "projector": model.model.multi_modal_projector,
        "talk": talk,
    }
    load_stages(vision, ["vision"], parts)
    load_stages(run, list(STAGES[: STAGES.index(last) + 1]), parts)
    return wrap(model.eval(), build_processor(sizes.patch_size))


def answer(mllm: MLLM, records: list[ShapesRecord], images: list[Any] | None, batch_size: int, title: str) -> list[str]:
    """Greedy answers of one word each; ``images`` None asks without an image."""
    answers: list[str] = []
    for start in tqdm(range(0, len(records), batch_size), desc=title, mininterval=1.0):
        part = slice(start, start + batch_size)
        batch = mllm.encode(None if images is None else images[part], [r.question for r in records[part]])
        answers += [str(a) for a in mllm.generate(batch, max_new_tokens=3)]
    return answers


def accuracy_table(records: list[ShapesRecord], answers: list[str]) -> dict[str, dict[str, float]]:
    """Accuracy by kind, and over all image kinds (``image``), with 95% intervals clustered by image."""
    right = np.array([r.answer == a for r, a in zip(records, answers, strict=True)], dtype=float)
    kinds = np.array([r.kind for r in records])
    clusters = np.array([r.image_id for r in records])
    groups = {str(kind): kinds == kind for kind in dict.fromkeys(kinds)} | {"image": np.isin(kinds, IMAGE_KINDS)}
    table = {}
    for name, chosen in groups.items():
        band = rate_band(right[chosen], clusters[chosen]).to_dict()
        table[name] = {"accuracy": band["mean"], "low": band["low"], "high": band["high"], "num": int(chosen.sum())}
    return table


def attention_values(mllm: MLLM, records: list[ShapesRecord], batch_size: int) -> dict[tuple[str, str], np.ndarray]:
    """The paper's three curves of every question, [n, L], as attention mass and as enrichment without sink."""
    values: dict[tuple[str, str], list[np.ndarray]] = {(m, c): [] for m in MEASURES for c in CURVES}
    for start in tqdm(range(0, len(records), batch_size), desc="attention", mininterval=1.0):
        part = records[start : start + batch_size]
        batch = mllm.encode([r.image() for r in part], [r.question for r in part])
        with torch.no_grad(), AttentionProbe(mllm) as probe:
            mllm.model(**batch)
        for measure, curve in values:
            values[measure, curve].append(probe.stats.mean_curve(curve, measure).numpy())
    return {name: np.concatenate(parts) for name, parts in values.items()}


def attention_record(mllm: MLLM, records: list[ShapesRecord], batch_size: int, seed: int) -> dict[str, Any]:
    """Mean curves, [L] each with bootstrap bands, by measure; and what the verdict on three stages says of them."""
    values, clusters = attention_values(mllm, records, batch_size), [r.image_id for r in records]
    record: dict[str, Any] = {measure: {} for measure in MEASURES}
    for (measure, curve), of_questions in values.items():
        record[measure][curve] = mean_band(of_questions, ImageBootstrap(clusters, seed=seed)).to_dict()
    cross, visual = (values["enrichment_no_sink", curve] for curve in ("cross", "visual"))
    record["stages"] = stage_verdict(cross, visual, ImageBootstrap(clusters, seed=seed)).to_dict()
    return record


def exit_agreement(mllm: MLLM, records: list[ShapesRecord], batch_size: int, seed: int) -> dict[str, Any]:
    """Share of answers that stay the full model's under each exit k = 0..L, and mean exit depth by kind."""
    agree = []
    for start in tqdm(range(0, len(records), batch_size), desc="exits", mininterval=1.0):
        part = records[start : start + batch_size]
        images, questions = [r.image() for r in part], [r.question for r in part]
        batch = mllm.encode(images, questions)
        given = [str(a) for a in mllm.generate(batch, max_new_tokens=3)]
        sweep = exit_sweep(mllm, batch, answer_ids=mllm.answer_ids(questions, given))
        agree.append(sweep.agree)
    together = torch.cat(agree)
    clusters = [r.image_id for r in records]
    depth = exit_depth(together.bool()).double().numpy()
    kinds = np.array([r.kind for r in records])
    by_kind = {}
    for kind in dict.fromkeys(kinds):
        mine = mean_band(depth[kinds == kind], ImageBootstrap(clusters, seed=seed)[kinds == kind])
        by_kind[str(kind)] = mine.to_dict()
    agreement = rate_band(together.double().numpy(), clusters)
    return {"agreement": agreement.to_dict(), "exit_depth": by_kind}


def read_log(path: Path) -> list[dict[str, Any]]:
    """The training log of one stage, the last word of a step counting where a resumed run repeated it."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return list({line["step"]: line for line in lines}.values())


def stage_log(run: Path, stage: str, cfg: DictConfig) -> list[dict[str, Any]]:
    """The log of one stage; the phases of instruction follow each other, their steps and seconds counted on."""
    names = [name for name, _ in phases(cfg)] if stage == "instruct" and "phases" in cfg else [stage]
    lines: list[dict[str, Any]] = []
    for file in (path for name in names if (path := run / f"{name}.jsonl").is_file()):
        before = lines[-1] if lines else {"step": 0, "seconds": 0.0}
        lines += [{**x, **{k: x[k] + before[k] for k in ("step", "seconds")}} for x in read_log(file)]
    return lines


@command("testbed_runs")
def main(cfg: DictConfig) -> None:
    """Write the record of one finished training run."""
    run = Path(cfg.run)
    if not (run / "config.yaml").is_file():
        raise ConfigError(f"run={run} is not a folder of a testbed run (it has no config.yaml)")
    trained = OmegaConf.load(run / "config.yaml")
    assert isinstance(trained, DictConfig)
    vision = Path(cfg.vision or run)
    logs = {s: lines for s in STAGES if (lines := stage_log(vision if s == "vision" else run, s, trained))}
    record: dict[str, Any] = {
        "name": trained.name,
        "config": OmegaConf.to_container(trained),
        "logs": logs,
        "seconds": {s: lines[-1]["seconds"] for s, lines in logs.items()},
        "machine": machine(),
        "attention": {},
        "note": cfg.note,
    }
    blind = bool(trained.instruct.blind)
    records = list(ShapesQuestions("test", cfg.num_questions, seed=cfg.seed))
    probed = list(ShapesQuestions("test", cfg.num_probed, seed=cfg.seed, kinds=IMAGE_KINDS))
    for stage in ("language", "align", "instruct"):
        if stage not in logs and stage != "instruct":
            continue
        if not (run / f"{stage}.pt").is_file():
            raise ConfigError(f"run={run}: stage {stage} is not finished (no {stage}.pt); resume the training first")
        mllm = stage_model(run, trained, stage, vision)
        if not blind:
            record["attention"][stage] = attention_record(mllm, probed, cfg.batch_size, cfg.seed)
    images = None if blind else [r.image() for r in records]
    record["accuracy"] = accuracy_table(records, answer(mllm, records, images, cfg.batch_size, "answers"))
    if not blind:
        record["exits"] = exit_agreement(mllm, probed, cfg.batch_size, cfg.seed)
        record["probes"] = probe_report(mllm, cfg.probe_scenes, cfg.batch_size, cfg.seed)
    target = Path(cfg.output_dir) / f"{trained.name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    write_json(target, record)
    print(f"{target}: image accuracy {record['accuracy']['image']['accuracy']:.3f}")


if __name__ == "__main__":
    main()
