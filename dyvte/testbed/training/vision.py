"""Training the vision tower to name what is in each patch."""

from __future__ import annotations

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from dyvte.testbed.model import TestbedSizes
from dyvte.testbed.training.batches import pixels
from dyvte.testbed.world import ATTRIBUTES, VALUES, patch_labels, sample_scene


class PatchHeads(nn.Module):
    """Linear read-outs of each patch's attributes and place, for the tower's pretraining only."""

    def __init__(self, width: int, side: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        sizes = {a: 1 + len(VALUES[a]) for a in ATTRIBUTES} | {"row": side, "column": side}
        self.heads = nn.ModuleDict({name: nn.Linear(width, size) for name, size in sizes.items()})

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        """Logits [B, V, 1 + values] of every attribute from features [B, V, width]; class 0 is background."""
        features = self.norm(features)
        return {a: head(features) for a, head in self.heads.items()}


def vision_batch(cfg: DictConfig, sizes: TestbedSizes, step: int, split: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Images of a step, and what is in each patch."""
    size = cfg.vision.batch_size
    scenes = [sample_scene(split, cfg.seed, step * size + i) for i in range(size)]
    labels = [patch_labels(s, sizes.patch_size) for s in scenes]
    return pixels(scenes), {a: torch.from_numpy(np.stack([x[a] for x in labels])) for a in labels[0]}
