"""Forward passes of the testbed in training, and what makes them fast."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import LlavaForConditionalGeneration
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dyvte.testbed.packing import IGNORE, PackedBatch
from dyvte.testbed.training.batches import pixels
from dyvte.testbed.world import COLUMNS, GRID, IMAGE_SIZE, ROWS, VALUES, Scene, patch_labels


def _matmul_attention(  # type: ignore[no-untyped-def]
    module, query, key, value, attention_mask, scaling=None, **_
) -> tuple[Tensor, None]:
    """Attention as two matrix products a group of query heads, no key repeated.

    On a CPU with bfloat16 units it trains twice as fast as the fused kernel.
    """
    batch, heads, length, width = query.shape
    groups = key.shape[1]
    scaling = width**-0.5 if scaling is None else scaling
    folded = (query * scaling).reshape(batch, groups, heads // groups * length, width)
    scores = (folded @ key.transpose(-1, -2)).view(batch, groups, heads // groups, length, -1)
    if attention_mask is not None:
        scores = scores + attention_mask.unsqueeze(1)
    weights = scores.softmax(-1).view(batch, groups, heads // groups * length, -1)
    return (weights @ value).view(batch, heads, length, width).transpose(1, 2).contiguous(), None


@contextmanager
def fast_training(device: torch.device, precision: str) -> Iterator[None]:
    """Autocast to ``precision`` and, on a CPU, attention by matrix products in place of transformers' fused one."""
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        if device.type != "cpu":
            yield
            return
        ALL_ATTENTION_FUNCTIONS["sdpa"] = _matmul_attention
        try:
            yield
        finally:
            del ALL_ATTENTION_FUNCTIONS["sdpa"]  # what was laid over the library's own


def device_and_precision(cfg: DictConfig) -> tuple[torch.device, str]:
    """What a trainer's configuration says; its number of threads is set.

    A precision of ``auto`` is bfloat16 on a GPU and on CPUs with bfloat16 units (four times float32's speed there),
    else float32.
    """
    device = torch.device(cfg.device)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    if cfg.precision != "auto":
        return device, cfg.precision
    native = torch.cuda.is_bf16_supported() if device.type == "cuda" else torch.backends.mkldnn.is_available()
    if device.type == "cpu":
        native = native and bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())
    return device, "bf16" if native else "fp32"


def visual_features(model: LlavaForConditionalGeneration, images: Tensor) -> Tensor:
    """Patch features [B, V, vision width] of the tower, as LLaVA takes them (class token dropped)."""
    return model.model.vision_tower(images).last_hidden_state[:, 1:]


def words_of_patches(
    model: LlavaForConditionalGeneration, scenes: list[Scene], ids: Callable[[str], list[int]]
) -> Tensor:
    """For every patch the sum of the embeddings of the words for what lies under it and where it is: [B, V, width].

    `ids` gives a word's token ids; a word of several tokens stands for itself by their sum.
    """
    table = model.get_input_embeddings().weight.detach()
    named = {**VALUES, "row": ROWS, "column": COLUMNS}
    words = {a: torch.stack([table[torch.tensor(ids(v))].sum(0) for v in values]) for a, values in named.items()}
    patch_size = model.config.vision_config.patch_size
    labels = [patch_labels(s, patch_size) for s in scenes]
    side = IMAGE_SIZE // patch_size
    total = torch.zeros(len(scenes), side * side, table.shape[1], device=table.device)
    for name, known in words.items():
        label = torch.from_numpy(np.stack([x[name] for x in labels])).to(table.device)
        if name in VALUES:  # class 0 is background, of which there is nothing to say
            known = torch.cat([torch.zeros_like(known[:1]), known])
        else:
            label = label * GRID // side
        total += known[label]
    return total


def initialise_projector(
    model: LlavaForConditionalGeneration,
    scenes: list[Scene],
    ids: Callable[[str], list[int]],
    steps: int = 300,
) -> None:
    """Start the projector where each patch says its words: the sum of their embeddings (``words_of_patches``).

    First a standardisation of the tower's features is folded in, whose large common vector would otherwise hide what
    tells patches apart; then the projector is fitted by least squares.
    """
    projector = model.model.multi_modal_projector
    with torch.no_grad():
        features = torch.cat(
            [visual_features(model, pixels(scenes[i : i + 50]).to(model.device)) for i in range(0, len(scenes), 50)]
        ).flatten(0, 1)
        mean, deviation = features.mean(0), features.std(0).clamp_min(1e-6)
        first = projector.linear_1
        nn.init.normal_(first.weight, std=first.in_features**-0.5)
        first.weight.div_(deviation)
        first.bias.copy_(-first.weight @ mean)
        nn.init.zeros_(projector.linear_2.bias)
    target = words_of_patches(model, scenes, ids).flatten(0, 1)
    lr = 3e-3
    optimizer = torch.optim.Adam(projector.parameters(), lr=lr)
    scale, left = float(target.square().mean()), float("nan")
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        chosen = torch.randint(len(features), (4096,)).to(features.device)
        error = (projector(features[chosen]) - target[chosen]).square().mean() / scale
        optimizer.zero_grad(set_to_none=True)
        error.backward()
        optimizer.step()
        left = float(error.detach())
    tqdm.write(f"projector starts at the words of the patches, relative squared error {left:.3f}")


def hidden_states(
    model: LlavaForConditionalGeneration, decoder: Callable[..., Any], batch: PackedBatch, features: Tensor | None
) -> Tensor:
    """Final hidden states [B, N, width] of packed sequences, ``features`` standing at the image positions."""
    embeds = model.get_input_embeddings()(batch.input_ids)
    if features is not None:
        projected = model.model.multi_modal_projector(features)
        at_image = (batch.input_ids == model.config.image_token_id).unsqueeze(-1)
        embeds = embeds.masked_scatter(at_image, projected.to(embeds.dtype))
    autocast = torch.is_autocast_enabled(embeds.device.type)
    mask = batch.attention_mask(torch.bfloat16 if autocast else torch.float32)
    return decoder(
        inputs_embeds=embeds, attention_mask=mask, position_ids=batch.position_ids, use_cache=False
    ).last_hidden_state


def packed_loss(
    model: LlavaForConditionalGeneration,
    states: Tensor,
    batch: PackedBatch,
    last: tuple[int, Callable[[Tensor], Tensor]] | None = None,
) -> Tensor:
    """Weighted mean cross-entropy (nats) over the labelled positions.

    With ``last`` = (n, loss) the last n of them have a loss of their own, of their logits [n, vocabulary].
    """
    chosen = batch.labels != IGNORE
    logits = model.lm_head(states[chosen]).float()
    losses = cross_entropy(logits, batch.labels[chosen], reduction="none")
    if last is not None:
        number, loss = last
        losses = torch.cat([losses[:-number], loss(logits[-number:])])
    weights = batch.weights[chosen]
    return (losses * weights).sum() / weights.sum()


@torch.no_grad()
def packed_accuracy(
    model: LlavaForConditionalGeneration, batch: PackedBatch, images: Tensor | None, chunk: int = 32
) -> dict[str, float]:
    """Teacher-forced accuracy by kind: of one-word answers (exactly greedy accuracy), of a tour's decided words."""
    right: dict[str, list[float]] = defaultdict(list)
    for start in range(0, len(batch.input_ids), chunk):
        part = slice(start, start + chunk)
        piece = batch.rows(part).to(model.device)
        features = visual_features(model, images[part].to(model.device)) if images is not None else None
        states = hidden_states(model, model.model.language_model, piece, features)
        correct = model.lm_head(states).argmax(-1) == piece.labels
        answered = piece.weights == 1.0
        for (row, number), kind in batch.kinds.items():
            if start <= row < start + chunk:
                mine = answered[row - start] & (piece.branch[row - start] == number)
                hits = correct[row - start][mine].float()
                if len(hits):
                    right[kind].append(float(hits.mean() if kind == "tour" else hits.min()))
    return {k: float(np.mean(v)) for k, v in right.items()}


def image_accuracy(
    model: LlavaForConditionalGeneration,
    held_out: tuple[PackedBatch, Tensor | None],
    image_kinds: Sequence[str],
    chunk: int = 32,
) -> dict[str, float]:
    """``packed_accuracy`` of a batch and its images, and the mean over the kinds of question that need the image."""
    found = packed_accuracy(model, *held_out, chunk)
    return {"accuracy": float(np.mean([v for k, v in found.items() if k in image_kinds]))} | found
