"""Policies whose setting is found on a few prompts when the configuration leaves it open.

A file of `conf/policy/` that can do this has a setting that is null and a block `calibrate` with what finds it:

    layer: null
    calibrate:
      _target_: dyvte.policies.exits.vtw.VTW.calibrate     # called with the model, batches and the keys below
      eta: 0.003

What was found is kept as `calibration.json` in the run folder, with what it was made of, and reused as long as that is
the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from dyvte.data.base import Dataset, Sample, build_dataset
from dyvte.errors import ConfigError, DataError, RunFolderError
from dyvte.mllm import MLLM
from dyvte.policies.base import Policy
from dyvte.runs import distributed
from dyvte.runs.store import model_fingerprint, plain, write_json
from dyvte.runs.targets import build
from dyvte.stored_files import read_json, short

FILE = "calibration.json"


def build_policy(cfg: DictConfig) -> Policy:
    """The policy of a configuration in `conf/policy/`; none of its settings may be left open."""
    if open_settings(cfg):
        (setting, *_) = open_settings(cfg)
        raise ConfigError(
            f"policy {cfg.name} needs policy.{setting}=...; python -m dyvte.evaluate and dyvte.generate find it "
            f"by themselves and keep it in {FILE}"
        )
    return _build(cfg)


def open_settings(cfg: DictConfig) -> list[str]:
    """Settings of a policy that are null and that its block `calibrate` finds."""
    if not cfg.get("calibrate"):
        return []
    return [str(key) for key, value in cfg.items() if value is None]


def calibration_of(mllm: MLLM, cfg: DictConfig) -> dict[str, Any]:
    """What a calibrated setting is made of, as in a fingerprint: the model, the prompts, and what is asked for."""
    data: Any = OmegaConf.to_container(cfg.calibration.data, resolve=True)
    dataset = build_dataset(cfg.calibration.data)
    made_of = {
        "model": model_fingerprint(mllm),
        "data": {**data, "samples": len(dataset), "content": dataset.fingerprint},
        "policy": OmegaConf.to_container(cfg.policy, resolve=True),
        "batch_size": cfg.batch_size,
    }
    return json.loads(json.dumps(plain(made_of), default=str))


def calibrated_policy(mllm: MLLM, cfg: DictConfig, folder: Path) -> Policy:
    """The policy of a command's configuration, its open setting calibrated or read from an earlier calibration.

    `calibration.json` lies in `folder`, a run folder that exists.
    """
    settings = open_settings(cfg.policy)
    if not settings:
        return build_policy(cfg.policy)
    with distributed.main_process_first():  # which calibrates for the others
        return _calibrate_or_read(mllm, cfg, settings, folder / FILE)


def _calibrate_or_read(mllm: MLLM, cfg: DictConfig, settings: list[str], file: Path) -> Policy:
    made_of = calibration_of(mllm, cfg)
    kept = read_json(file, RunFolderError, "delete it") if file.is_file() else {}
    found: dict[str, Any] = kept.get("found", {})
    if kept.get("made_of") != made_of:
        samples = with_image(build_dataset(cfg.calibration.data))
        parts = (samples[start : start + cfg.batch_size] for start in range(0, len(samples), cfg.batch_size))
        batches = [mllm.encode([each.image for each in part], [each.question for each in part]) for part in parts]
        calibrate: Any = OmegaConf.to_container(cfg.policy.calibrate, resolve=True)
        with torch.no_grad():
            policy = build(calibrate, Policy, mllm, batches)
        values = {name: getattr(policy, name) for name in settings}
        found = plain({name: vars(each) if is_dataclass(each) else each for name, each in values.items()})
        write_json(file, {"num_samples": len(samples), "found": found, "made_of": made_of})
        how = f"calibrated on {len(samples)} prompts of {cfg.calibration.data.name}"
    else:
        if not isinstance(found, dict) or sorted(found) != sorted(settings) or not _only_numbers(list(found.values())):
            raise RunFolderError(f"{file} holds {short(found)}, not numbers for {', '.join(settings)}: delete it")
        how = f"calibrated before, on {kept.get('num_samples')} prompts"
    if distributed.is_main():
        print(f"{cfg.policy.name} {how}: {', '.join(f'{name} {_short(found[name])}' for name in found)} ({file})")
    return _build(cfg.policy, found)


def _only_numbers(value: Any) -> bool:
    """Whether a setting read from a file is numbers all through: no name of a class or a file."""
    if isinstance(value, dict):
        return "_target_" not in value and _only_numbers(list(value.values()))
    return all(map(_only_numbers, value)) if isinstance(value, list) else isinstance(value, (int, float))


def _build(cfg: DictConfig, found: Mapping[str, Any] | None = None) -> Policy:
    settings: Any = OmegaConf.to_container(cfg, resolve=True)
    settings.update(found or {})
    for not_of_the_policy in ("name", "calibrate"):
        settings.pop(not_of_the_policy, None)
    return build(settings, Policy)


def with_image(dataset: Dataset) -> list[Sample]:
    """Samples that can be read and show an image."""
    samples = [sample for sample in dataset.readable() if sample.image is not None]
    if not samples:
        raise DataError(
            "no prompt with an image to calibrate on: set calibration.data, for instance "
            "data@calibration.data=llava_json calibration.data.file=FILE"
        )
    return samples


def _short(value: Any) -> str:
    if not isinstance(value, dict):
        return str(value)
    shown = {name: each for name, each in value.items() if isinstance(each, (int, float))}
    return " ".join(f"{name}={each:.3g}" for name, each in shown.items())
