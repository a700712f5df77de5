"""One stage of training: steps, checkpoints, and going on from them."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import LlavaForConditionalGeneration

from dyvte.errors import ConfigError
from dyvte.runs.store import write_atomic
from dyvte.runs.terminal import progress


def learning_rate(step: int, steps: int, peak: float, warmup: float, decay: float) -> float:
    """Linear warm-up, a constant stretch, then a cosine to zero over the last ``decay`` share of the steps."""
    if step < warmup * steps:
        return peak * (step + 1) / (warmup * steps)
    rest = (step - (1 - decay) * steps) / (decay * steps)
    return peak * (0.5 * (1 + math.cos(math.pi * min(rest, 1.0))) if rest > 0 else 1.0)


class _Steps(Dataset[Any]):
    """Batches by step, so that a worker process can prepare the next ones."""

    def __init__(self, batch_of: Callable[[int, float], Any], steps: int) -> None:
        self.batch_of, self.steps = batch_of, steps

    def __getitem__(self, step: int) -> Any:
        return self.batch_of(step, step / self.steps)


def run_stage(
    name: str,
    folder: Path,
    modules: dict[str, nn.Module],
    cfg: DictConfig,
    batch_of: Callable[[int, float], Any],
    loss_of: Callable[..., Tensor],
    evaluate: Callable[[], dict[str, float]],
    seed_everything: int,
    workers: int,
) -> None:
    """Train ``modules`` for one stage; resume from, and write, ``folder/<name>.pt``. A finished stage is a no-op.

    ``batch_of`` maps (step, progress 0..1) to a batch and takes all randomness from the step; ``loss_of`` maps a batch
    to its loss. ``cfg`` holds steps, lr, warmup, decay, weight_decay, clip, checkpoint_every and eval_every.
    """
    path = folder / f"{name}.pt"
    parameters = [p for m in modules.values() for p in m.parameters()]
    groups = []
    for key, module in modules.items():
        scale = cfg.get("projector_rate", 1.0) if key == "projector" else 1.0  # of instruction only
        for decay, matrix in ((cfg.weight_decay, True), (0.0, False)):
            chosen = [p for p in module.parameters() if (p.ndim >= 2) == matrix]
            groups.append({"params": chosen, "weight_decay": decay, "scale": scale})
    optimizer = torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, 0.98))
    first, seconds = 0, 0.0
    if path.exists():
        saved = torch.load(path, weights_only=True)
        for key, module in modules.items():
            module.load_state_dict(saved["modules"][key])
        first, seconds = saved["step"], saved["seconds"]
        if first < cfg.steps:
            optimizer.load_state_dict(saved["optimizer"])
    if first >= cfg.steps:
        return
    torch.manual_seed(seed_everything)
    from torch.utils.tensorboard import SummaryWriter

    log = (folder / f"{name}.jsonl").open("a")
    started = time.monotonic()
    with SummaryWriter(str(folder / "tensorboard" / name), purge_step=first) as board, log:
        of_bar = {"initial": first, "total": cfg.steps, "mininterval": 5.0}
        bar = progress(name, "steps", range(first, cfg.steps), **of_bar)
        running = float("nan")
        steps = DataLoader(
            _Steps(batch_of, cfg.steps), batch_size=None, sampler=range(first, cfg.steps), num_workers=workers
        )
        for step, batch in zip(bar, steps, strict=True):
            rate = learning_rate(step, cfg.steps, cfg.lr, cfg.warmup, cfg.decay)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["scale"]
            loss = loss_of(batch)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(parameters, cfg.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            value = float(loss.detach())
            if not math.isfinite(value):
                raise FloatingPointError(f"testbed stage {name}: loss is {value} at step {step}; lower {name}.lr")
            running = value if math.isnan(running) else 0.95 * running + 0.05 * value
            bar.set_postfix(loss=f"{running:.3f}", lr=f"{rate:.1e}", refresh=False)
            board.add_scalar(f"{name}/loss", value, step)
            done = step + 1
            if done % cfg.eval_every == 0 or done == cfg.steps:
                elapsed = seconds + time.monotonic() - started
                record: dict[str, Any] = {"stage": name, "step": done, "seconds": round(elapsed, 1), "loss": running}
                record |= {"grad_norm": float(norm)} | evaluate()
                for key, number in record.items():
                    if isinstance(number, float):
                        board.add_scalar(f"{name}/{key}", number, done)
                log.write(json.dumps(record) + "\n")
                log.flush()
                tqdm.write(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in record.items()}))
            if done % cfg.checkpoint_every == 0 or done == cfg.steps:
                content: dict[str, Any] = {"modules": {k: m.state_dict() for k, m in modules.items()}, "step": done}
                content["seconds"] = seconds + time.monotonic() - started
                if done < cfg.steps:
                    content["optimizer"] = optimizer.state_dict()
                write_atomic(path, partial(torch.save, content))


def continue_from(model: LlavaForConditionalGeneration, folder: Path) -> None:
    """Start from an exported model, such as the one that ships; its sizes and vocabulary must be this run's."""
    exported = LlavaForConditionalGeneration.from_pretrained(folder, local_files_only=True).state_dict()
    wanted = model.state_dict()
    if differing := [k for k in wanted if k not in exported or exported[k].shape != wanted[k].shape]:
        raise ConfigError(
            f"init_from={folder} holds a model of other sizes or words ({differing[0]} and {len(differing) - 1} more "
            "differ): set sizes.* to its own"
        )
    model.load_state_dict(exported)


def load_stages(folder: Path, stages: list[str], modules: dict[str, nn.Module]) -> None:
    """Load what the finished ``stages`` of another run learnt, in order; missing checkpoints are passed over."""
    if not folder.is_dir():
        raise ConfigError(f"init_from={folder} is not a folder of a testbed run")
    for path in (folder / f"{s}.pt" for s in stages):
        if path.exists():
            saved = torch.load(path, weights_only=True)["modules"]
            for key in modules.keys() & saved.keys():
                modules[key].load_state_dict(saved[key])
