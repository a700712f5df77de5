"""Clusters of tokens around density peaks (Rodriguez and Laio, 2014), density by nearest neighbours (DPC-KNN)."""

from __future__ import annotations

import torch
from torch import Tensor


def density_peaks(features: Tensor, number: int, neighbours: int) -> tuple[Tensor, Tensor]:
    """Cluster tokens [m, d] by density peaks: centres [number], and which of them each token belongs to [m].

    Density is exp of the negative mean squared distance to the nearest `neighbours`, itself included; centres have the
    largest product of density and distance to a denser token. Of equal ones the earlier comes first.
    """
    distance = torch.cdist(features.float(), features.float()) / features.shape[1] ** 0.5
    density = (-distance.topk(min(neighbours, len(distance)), largest=False).values.square().mean(1)).exp()
    denser = density[None] > density[:, None]
    apart = distance.masked_fill(~denser, torch.inf).amin(1)
    apart = torch.where(denser.any(1), apart, distance.amax(1))
    centres = (density * apart).argsort(descending=True, stable=True)[:number]
    belongs = distance[:, centres].argmin(1)
    belongs[centres] = torch.arange(number, device=centres.device)
    return centres, belongs


def cluster_means(features: Tensor, number: int, neighbours: int) -> tuple[Tensor, Tensor]:
    """Centres [number] of the clusters of tokens [m, d], and the mean of each [number, d]."""
    centres, belongs = density_peaks(features, number, neighbours)
    return centres, torch.stack([features[belongs == each].mean(0) for each in range(number)])
