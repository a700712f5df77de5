"""Effects of knock-outs with bands over images that cover all paths and windows at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from dyvte.gates.metrics import wilson_limits

from .bands import LEVEL, Array, Band, Clusters, ImageBootstrap, keyed_array, simultaneous_band

NO_WIDTH = 1e-9
"""A band that is no wider comes from samples that do not vary, up to rounding."""
MEASURES = {"agreement_points": "agree", "nats": "nats", "first_token_percent": "first_percent"}
"""Name of each effect, and its column: same answer in percentage points, log p(answer), p(first token) in percent."""


def sample_effects(table: pd.DataFrame, ids: Clusters, *axes: str) -> dict[str, Array]:
    """Each of `MEASURES` as `[n, ...]`: 0 where nothing changed, negative where the path was of use."""
    values = {name: keyed_array(table, column, ids, *axes) for name, column in MEASURES.items()}
    values["agreement_points"] = 100 * (values["agreement_points"] - 1)
    return values


def effect_band(values: Array, bootstrap: ImageBootstrap, limits: tuple[float, float] | None = None) -> Band:
    """Mean over samples of `values [n, ...]` with a band that covers every entry at once (sup-t over images).

    Args:
        limits: the least and the largest value that a sample can have, if there are such. The band stays between them,
            and has a width where all samples agree: as Wilson's interval, Bonferroni over the entries, where the mean
            is at a limit or no sample shows an effect.

    Returns:
        Limits are NaN, that is, no interval is claimed, where `limits` are not given and nothing varies over images:
        all samples have one value, or there is one image. How far a value without bounds could go cannot be told then.
    """
    band = simultaneous_band(*bootstrap.mean(values))
    mean, flat = band.mean, ~(band.high - band.low > NO_WIDTH)
    if limits is None:
        return Band(mean, np.where(flat, np.nan, band.low), np.where(flat, np.nan, band.high))
    least, largest = limits
    _, reach = wilson_limits(0.0, bootstrap.num_images, 1 - (1 - LEVEL) / max(1, mean.size))
    low = np.where(flat, np.minimum(band.low, mean + reach * (least - mean)), band.low)
    high = np.where(flat, np.maximum(band.high, mean + reach * (largest - mean)), band.high)
    return Band(mean, np.maximum(low, least), np.minimum(high, largest))


def effect_bands(values: Mapping[str, Array], bootstrap: ImageBootstrap) -> dict[str, Band]:
    """`effect_band` of each of `MEASURES`; agreement, in points, is at most what it was."""
    limits = {"agreement_points": (-100.0, 0.0)}
    return {name: effect_band(each, bootstrap, limits.get(name)) for name, each in values.items()}


def over_control(effects: dict[str, Array], names: Sequence[str], bootstrap: ImageBootstrap) -> dict[str, Any]:
    """How much more each path does than its controls, question by question: control -> measure -> band.

    The controls of a path are as many random keys, and text keys that get as much attention; that of an image's objects
    is as many of its other patches.
    """
    control_of = {f"{name} ({what})": name for what in ("random", "mass") for name in names} | {
        name.replace("(objects)", "(other patches)"): name for name in names if "(objects)" in name
    }
    pairs = [(control, names.index(name)) for control, name in control_of.items() if control in names]
    if not pairs:
        return {}
    found: dict[str, Any] = {control: {} for control, _ in pairs}
    for measure, values in effects.items():
        difference = np.stack([values[:, path] - values[:, names.index(control)] for control, path in pairs], axis=1)
        limits = (-100.0, 100.0) if measure == "agreement_points" else None
        band = effect_band(difference, bootstrap, limits)
        for index, (control, _) in enumerate(pairs):
            found[control][measure] = band[index].to_dict()
    return found


def mass_reached(table: pd.DataFrame, ids: Clusters) -> dict[str, list[float | None]]:
    """How near the keys cut in the image's place came to its attention: name -> share of it by window, over samples.

    From the table `equal_mass` of a run, for the samples that count; None in a window without attention on the image.
    """
    sums = table[table["id"].isin(ids)].groupby(["name", "window"])[["mass", "image_mass"]].sum()
    share = (sums["mass"] / sums["image_mass"]).where(sums["image_mass"] > 0)
    return {
        str(name): [None if np.isnan(each) else float(each) for each in by_window]
        for name, by_window in share.groupby(level="name")
    }
