"""What one visual token of the testbed tells by itself: linear probes on the decoder's input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from analysis.statistics.bands import rate_band
from dyvte.mllm import MLLM
from dyvte.testbed.questions import DIRECTIONS, follow
from dyvte.testbed.training.batches import pixels
from dyvte.testbed.world import ATTRIBUTES, IMAGE_SIZE, VALUES, sample_scene

OWN, NEIGHBOR = "its own", "its only neighbour's"
"""How the probes of `probe_report` begin: `its own color`, `its only neighbour's color`."""


def linear_probe(train: Tensor, train_labels: Tensor, test: Tensor, classes: int, penalty: float = 1e-3) -> Tensor:
    """Predictions [n_test] of a multinomial logistic regression on standardised features [n, d], fitted by L-BFGS."""
    mean, scale = train.mean(0), train.std(0).clamp_min(1e-6)
    x, x_test = (train - mean) / scale, (test - mean) / scale
    weight = torch.zeros(x.shape[1], classes, requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(x @ weight + bias, train_labels) + penalty * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return (x_test @ weight + bias).argmax(-1).detach()


@torch.no_grad()
def object_tokens(mllm: MLLM, num_scenes: int, batch_size: int, seed: int) -> tuple[Tensor, list[Any], list[Any]]:
    """The decoder's input at the visual token under each object's centre: [n, d], with its object and scene."""
    model = mllm.model
    side = IMAGE_SIZE // model.config.vision_config.patch_size
    tokens, objects, scenes = [], [], []
    for start in range(0, num_scenes, batch_size):
        part = [sample_scene("probe", seed, i) for i in range(start, min(start + batch_size, num_scenes))]
        features = model.model.vision_tower(pixels(part)).last_hidden_state[:, 1:]
        projected = model.model.multi_modal_projector(features)
        for row, scene in enumerate(part):
            for item in scene.objects:
                patch = int(item.y * side // IMAGE_SIZE) * side + int(item.x * side // IMAGE_SIZE)
                tokens.append(projected[row, patch])
                objects.append(item)
                scenes.append(scene)
    return torch.stack(tokens), objects, scenes


def probe_report(mllm: MLLM, num_scenes: int, batch_size: int, seed: int) -> dict[str, dict[str, float]]:
    """What a linear read-out of one visual token knows: of its own object, and of the object next to it.

    The second is what the questions of two hops need; where the probe stays at the majority rate, relating objects is
    left to the decoder.
    """
    tokens, objects, scenes = object_tokens(mllm, num_scenes, batch_size, seed)
    owners = np.array([s.index for s in scenes])
    held_out = torch.from_numpy(owners >= 0.75 * num_scenes)
    report = {}

    def fit(name: str, values: list[str | None], choices: Sequence[str]) -> None:
        known = torch.tensor([v is not None for v in values])
        labels = torch.tensor([choices.index(v) if v is not None else 0 for v in values])
        train, test = known & ~held_out, known & held_out
        predicted = linear_probe(tokens[train], labels[train], tokens[test], len(choices))
        band = rate_band((predicted == labels[test]).double().numpy(), owners[test.numpy()])
        majority = float(labels[test].bincount().max() / test.sum())
        report[name] = {"accuracy": float(band.mean), "low": float(band.low), "high": float(band.high)}
        report[name] |= {"majority": majority, "num": int(test.sum())}

    for attribute in ATTRIBUTES:
        fit(f"{OWN} {attribute}", [o[attribute] for o in objects], VALUES[attribute])
    for attribute in ATTRIBUTES:
        values: list[str | None] = []
        for item, scene in zip(objects, scenes, strict=True):
            neighbors = [n for d in DIRECTIONS if (n := follow(scene, item, d)) is not None]
            values.append(neighbors[0][attribute] if len(neighbors) == 1 else None)
        fit(f"{NEIGHBOR} {attribute}", values, VALUES[attribute])
    return report
