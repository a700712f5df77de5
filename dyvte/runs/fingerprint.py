"""What a run's tables depend on, as digests: a run folder is continued only by the run that began it."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import DictConfig, OmegaConf

from dyvte.version import __version__

if TYPE_CHECKING:
    from dyvte.data.base import Dataset
    from dyvte.mllm import MLLM

HASHED_ELEMENTS = 1 << 16
"""Elements of each parameter that enter the model's fingerprint; smaller parameters enter whole."""


def model_fingerprint(mllm: MLLM) -> dict[str, str]:
    """Class, configuration and weights of a model, the latter two as digests.

    Large parameters are sampled at even strides, which tells a fine-tuned copy from its origin in seconds for a model
    of any size. Parameters that an offloading device map keeps elsewhere enter with their shape.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(mllm.model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        if not tensor.is_meta and tensor.numel():
            flat = tensor.detach().reshape(-1)
            sample = flat[:: max(1, flat.numel() // HASHED_ELEMENTS)].contiguous().cpu()
            digest.update(sample.view(torch.uint8).numpy().tobytes())
    config = mllm.model.config.to_dict()
    for key in ("_name_or_path", "transformers_version"):
        config.pop(key, None)
    return {"class": type(mllm.model).__name__, "config": json_digest(config), "weights": digest.hexdigest()[:16]}


def fingerprint(mllm: MLLM, dataset: Dataset, cfg: DictConfig, **settings: Any) -> dict[str, Any]:
    """What a run's tables depend on: the model, the data, and the settings that enter every command's results.

    Of the composed configuration `model` (without its path), `data`, `seed` and `batch_size` are taken; `settings` are
    whatever else the command's tables depend on.
    """
    model: Any = OmegaConf.to_container(cfg.model, resolve=True)
    data: Any = OmegaConf.to_container(cfg.data, resolve=True)
    for key in ("name", "path", "revision"):  # the digests say what was loaded, wherever it lies
        model.pop(key, None)
    return {
        "model": {**model, **model_fingerprint(mllm)},
        "data": {**data, "samples": len(dataset), "content": dataset.fingerprint},
        "versions": {"dyvte": __version__, "torch": torch.__version__.partition("+")[0]},
        "settings": {
            "command": cfg.command,
            "seed": cfg.seed,
            "batch_size": cfg.batch_size,
            "device": mllm.device.type,
            **settings,
        },
    }


def json_digest(content: Any) -> str:
    """SHA-256 of plain data, shortened to 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]
