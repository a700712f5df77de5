"""The view as one figure, to be saved as PNG."""

from __future__ import annotations

import math

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ..plots.style import CYCLE, figure_style, layer_axis, png_of, wrapped
from .markup import heat
from .reading import Reading, largest
from .state import ViewState

DPI = 130
HEADS_A_ROW = 8
SINK_COLOUR, REGION_COLOUR = "#0072b2", "#009e73"


def draw_view(reading: Reading, state: ViewState) -> Figure:
    """The image under the chosen token's attention, its share on the image by layer, and every head."""
    rows, columns = reading.grid.shape
    on_image = reading.on_image(state.token)
    lines = math.ceil(reading.num_heads / HEADS_A_ROW)
    with figure_style():
        figure = plt.figure(figsize=(8.4, 4.4 + 1.25 * lines), layout="constrained")
        above, below = figure.subfigures(2, 1, height_ratios=[4.0, 0.3 + 1.25 * lines])
        left, right = above.subplots(1, 2)
        values = reading.attention_map(state.token, state.layer, state.head)
        extent = (-0.5, columns - 0.5, rows - 0.5, -0.5)
        left.imshow(reading.grid.image, extent=extent)
        left.imshow(heat(values, largest(values)), extent=extent, interpolation="nearest")
        for row, column in np.argwhere(reading.sink_map(state.layer)):
            left.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor=SINK_COLOUR))
        if state.region is not None:
            top, first, bottom, last = state.region
            size = (last - first + 1, bottom - top + 1)
            left.add_patch(Rectangle((first - 0.5, top - 0.5), *size, fill=False, edgecolor=REGION_COLOUR, linewidth=2))
        left.set_axis_off()
        whose = "mean over heads" if state.head is None else f"head {state.head}"
        left.set_title(f"layer {state.layer}, {whose}")
        share = on_image.sum(-1)
        right.bar(
            range(reading.num_layers),
            share.mean(1) if state.head is None else share[:, state.head],
            color=[CYCLE[1].color if each == state.layer else CYCLE[0].color for each in range(reading.num_layers)],
        )
        layer_axis(right, reading.num_layers)
        right.set_ylabel("share of the attention on the image")
        panels = below.subplots(lines, min(HEADS_A_ROW, reading.num_heads), squeeze=False)
        scale = largest(on_image[state.layer])
        for axis in panels.flat[reading.num_heads :]:
            axis.set_axis_off()
        for head, axis in enumerate(panels.flat[: reading.num_heads]):
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set(visible=True, color="#bbbbbb")
            axis.imshow(heat(reading.grid.arrange(on_image[state.layer, head]), scale), interpolation="nearest")
            axis.set_title(f"head {head}: {share[state.layer, head]:.0%}", fontsize=8)
        answer = " ".join(word.strip() for word in reading.words)
        title = f"{state.model}: {reading.question}\nattention for “{reading.words[state.token].strip()}” of: {answer}"
        figure.suptitle("\n".join(wrapped(line, 90) for line in title.splitlines()))
    return figure


def png_of_view(reading: Reading, state: ViewState) -> bytes:
    """`draw_view` as PNG."""
    return png_of(draw_view(reading, state), DPI)
