"""The figure of `analysis.stages` for videos: which frame is looked at, layer by layer."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from .style import Summary, figure_style, layer_axis, title_of, wrapped

MOST_NUMBERS = 240
"""Cells, at most, that have their number written in them."""


def draw_frames(summary: Summary) -> Figure:
    """The share of each frame in each layer, relative to an even share (1)."""
    found = summary["frames"]
    relative = np.array(found["share"]["mean"], dtype=float) * found["frames"]  # [L, F]
    layers, frames = relative.shape
    top = max(float(np.nanmax(relative)), 2.0)
    with figure_style():
        size = (max(5.4, 0.36 * layers + 1.8), max(2.4, 0.36 * frames + 1.7))
        figure, axis = plt.subplots(figsize=size, layout="constrained")
        shown = axis.imshow(relative.T, cmap="rocket_r", vmin=0, vmax=top, aspect="auto", interpolation="nearest")
        if layers * frames <= MOST_NUMBERS:
            for (layer, frame), value in np.ndenumerate(relative):
                if np.isfinite(value):
                    colour = "white" if value > top / 2 else "black"
                    axis.text(layer, frame, f"{value:.1f}", ha="center", va="center", color=colour, fontsize=7)
        layer_axis(axis, layers)
        axis.set_ylabel("frame (1 = first)")
        axis.set_yticks(range(frames), [str(frame + 1) for frame in range(frames)])
        figure.colorbar(shown, ax=axis).set_label("share of the frame,\ntimes an even share (= 1)", fontsize=8)
        note = f"attention of the prompt's last token on the video, n = {found['num_videos']:,} videos"
        if found["left_out"]:
            note += f"; left out, of another length: {found['left_out']:,}"
        axis.set_title(wrapped(f"Which frame is looked at: {title_of(summary)}", 60))
        figure.supxlabel(wrapped(note, int(14 * size[0])), fontsize=8)
        return figure
