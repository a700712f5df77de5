"""Figures of `analysis.lens`."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from .style import CYCLE, Summary, add_legend, draw_band, new_figure, share_axis, size_in_words, title_of

SHOWN_LAYERS = 4
DIMMEST = 0.25
AFTER_LAYER = "after layer (0: the decoder's input)"
BANDS = "bands: 95% over images"


def draw_answer_lens(summary: Summary) -> Figure:
    """When the model's own answer appears at the end of the prompt."""
    with new_figure(1, 2, figsize=(9.2, 3.8), sharex=True) as (figure, axes):
        labels = {
            "answer_probability": "probability of the answer",
            "is_answer": "answer is the likeliest token (share)",
        }
        for axis, (column, label) in zip(axes, labels.items(), strict=True):
            for series, (name, curves) in zip(CYCLE, summary["answer"].items(), strict=False):
                draw_band(axis, curves[column], series.named(name))
            axis.set(xlabel=AFTER_LAYER, ylabel=label)
            share_axis(axis)
        figure.suptitle(f"When the answer appears at the end of the prompt\n{title_of(summary)}")
        add_legend(figure, axes[0], f"n = {size_in_words(summary, 'num_questions')}; {BANDS}")
        return figure


def draw_patch_lens(summary: Summary) -> Figure:
    """How often the likeliest token at a patch names the object that it shows."""
    with new_figure(figsize=(6.6, 4.0)) as (figure, axis):
        for series, (attribute, curves) in zip(CYCLE, summary["patches"].items(), strict=False):
            draw_band(axis, curves["share"], series.named(f"its {attribute}"))
            axis.plot(np.array(curves["control"]["mean"]), color=series.color, linewidth=0.9, linestyle=":")
        axis.set(xlabel=AFTER_LAYER, ylabel="patches of an object whose\nlikeliest token names ...")
        share_axis(axis)
        figure.suptitle(f"What the patches say\n{title_of(summary)}")
        note = f"{summary['num_images']:,} images; {BANDS}; dotted: names of the image's other objects"
        add_legend(figure, axis, note)
        return figure


def draw_lens_grid(image: Any, words: list[list[str]], probabilities: np.ndarray) -> Figure | None:
    """The likeliest word of every patch over the image, after some layers; None where patches form no square grid.

    Args:
        words: [L + 1][V].
        probabilities: [L + 1, V]; a word is the darker the surer.
    """
    side = int(len(words[0]) ** 0.5)
    if side * side != len(words[0]):
        return None
    chosen = np.unique(np.linspace(0, len(words) - 1, SHOWN_LAYERS).round().astype(int))
    with new_figure(1, len(chosen), figsize=(4.2 * len(chosen), 4.6), squeeze=False) as (figure, axes):
        for axis, layer in zip(axes[0], chosen, strict=True):
            axis.imshow(image, extent=(0, side, side, 0), alpha=0.45)
            for place, word in enumerate(words[layer]):
                row, column = divmod(place, side)
                strength = DIMMEST + (1 - DIMMEST) * float(probabilities[layer, place])
                shown = word if len(word) <= 6 else f"{word[:5]}\N{HORIZONTAL ELLIPSIS}"
                look: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 72 / side, "alpha": strength}
                axis.text(column + 0.5, row + 0.5, shown, **look)
            axis.set_title(f"after layer {layer}" if layer else "decoder's input")
            axis.set_axis_off()
        return figure
