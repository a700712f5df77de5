"""A classifier that sees everything: statuses of all layers at once, words and kind of the question.

No policy can run it, since it knows what later layers say before an exit at the first. It bounds what gates can do with
the labels there are, and can teach them: its probabilities are softer than labels, which hold luck.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from dyvte.gates.features import LENS, QUESTION
from dyvte.gates.labels import LabelSet
from dyvte.instrument.states import TEXT_STATUS

HIDDEN, DROPOUT, LEARNING_RATE, WEIGHT_DECAY = 128, 0.3, 1e-3, 0.05
EPOCHS, PATIENCE, BATCH = 20, 3, 128
STOPPING_FOLDS = 10
"""One image of so many says when training stops."""
LARGEST = 5.0
"""Standardised entries are cut at so many standard deviations."""


def everything(labels: LabelSet, kinds: Sequence[str]) -> Tensor:
    """[n, F] text statuses of all layers, lens and question where the set holds them, and which of `kinds` it is."""
    parts = [*TEXT_STATUS, *(part for part in (LENS, QUESTION) if part in labels.kept)]
    shown = [labels.status([part])[:, : 1 if part == QUESTION else None].flatten(1).float() for part in parts]
    index = torch.tensor([kinds.index(each) for each in labels.samples["kind"].astype(str)])
    return torch.cat([*shown, F.one_hot(index, len(kinds)).float()], dim=1)


def folds_of(images: Sequence[str], folds: int) -> Tensor:
    """[n] fold of every image, from its id alone."""
    return torch.tensor(
        [int(hashlib.sha256(f"teacher {each}".encode()).hexdigest()[:8], 16) % folds for each in images]
    )


class Teacher:
    """A perceptron for the answers of all exits at once, fitted when it is made.

    `features` are those of `everything`, `targets` [n, K] of 0 and 1; images of one fold in `STOPPING_FOLDS` say when
    to stop.
    """

    def __init__(self, features: Tensor, targets: Tensor, images: Sequence[str], seed: int = 0) -> None:
        stop = folds_of(images, STOPPING_FOLDS) == 0
        learn, held = (~stop).nonzero().flatten(), stop.nonzero().flatten()
        self.shift, scale = features[learn].mean(0), features[learn].std(0)
        self.scale = torch.where(scale > 0, 1 / scale.clamp(min=1e-6), 0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.net = nn.Sequential(
                nn.Dropout(DROPOUT), nn.Linear(features.shape[1], HIDDEN), nn.GELU(),
                nn.Dropout(DROPOUT), nn.Linear(HIDDEN, targets.shape[1]),
            )  # fmt: skip
            self._fit(self._standardised(features), targets.float(), learn, held)

    @torch.no_grad()
    def __call__(self, features: Tensor) -> Tensor:
        """[n, K] probability of every target."""
        return self.net(self._standardised(features)).sigmoid()

    def _standardised(self, features: Tensor) -> Tensor:
        return ((features - self.shift) * self.scale).clamp(-LARGEST, LARGEST)

    def _fit(self, seen: Tensor, targets: Tensor, learn: Tensor, held: Tensor) -> None:
        optimizer = torch.optim.AdamW(self.net.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        best, weights, waited = float("inf"), self.net.state_dict(), 0
        for _ in range(EPOCHS):
            self.net.train()
            for rows in learn[torch.randperm(len(learn))].split(BATCH):
                loss = F.binary_cross_entropy_with_logits(self.net(seen[rows]), targets[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            self.net.eval()
            with torch.no_grad():
                found = float(F.binary_cross_entropy_with_logits(self.net(seen[held]), targets[held]))
            if found < best:
                best, weights, waited = found, copy.deepcopy(self.net.state_dict()), 0
            elif (waited := waited + 1) >= PATIENCE:
                break
        self.net.load_state_dict(weights)
        self.net.eval()


def taught(labels: LabelSet, rule: Tensor, rows: Tensor, folds: int = 2) -> Tensor:
    """[N, L - 1] what teachers say of every question, each of the one that has not seen its image.

    `rule` is [N, L + 1]; teachers learn from `rows`, none of them of the validation images.
    """
    kinds = sorted(set(labels.samples["kind"].astype(str)))
    features, images = everything(labels, kinds), labels.samples["image_id"].astype(str).tolist()
    targets, fold = rule[:, 1:-1], folds_of(images, folds)
    said = torch.zeros(targets.shape)
    for number in range(folds):
        own = rows[fold[rows] != number]
        teacher = Teacher(features[own], targets[own], [images[row] for row in own.tolist()], number)
        said[fold == number] = teacher(features[fold == number])
    return said
