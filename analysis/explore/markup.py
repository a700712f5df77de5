"""The parts of the page as HTML: functions of a reading and a view. Text is escaped, pictures are `data:` addresses."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
import numpy.typing as npt
import seaborn as sns
from PIL import Image

from ..plots.style import data_address, data_url
from .altered import AlteredAnswer, CutAnswer, MethodAnswer
from .reading import Reading, largest
from .state import ViewState

PALETTE = np.array(sns.color_palette("rocket_r", 256))
"""Colours from no attention to much, those of the figures."""

THUMBNAIL = 96
"""Pixels of an example's longer side."""

STRONGEST = 0.85
"""Opacity of the patch with the most attention."""


def heat(values: npt.NDArray[Any], top: float) -> Image.Image:
    """A map [rows, columns] as a picture of as many pixels: dark and opaque where it is near `top`."""
    share = np.clip(np.nan_to_num(values) / top, 0, 1)
    colour = PALETTE[np.round(share * (len(PALETTE) - 1)).astype(int)]
    return Image.fromarray(np.round(255 * np.dstack([colour, STRONGEST * np.sqrt(share)])).astype(np.uint8), "RGBA")


def veil(kept: npt.NDArray[np.bool_]) -> Image.Image:
    """Patches that are gone, [rows, columns], as a picture that greys them out."""
    pixels = np.zeros((*kept.shape, 4), dtype=np.uint8)
    pixels[~kept] = (250, 250, 250, 225)
    return Image.fromarray(pixels, "RGBA")


def _button(kind: str, value: Any, pressed: bool, inner: str, title: str = "") -> str:
    """A button whose press sends `value` to the page as an event of its kind."""
    said = f' title="{title}"' if title else ""
    return f'<button type="button" data-{kind}="{value}" aria-pressed="{str(pressed).lower()}"{said}>{inner}</button>'


def _under(photo: str, over: Image.Image, alt: str) -> str:
    """The image as the model sees it, under a picture of the same shape."""
    return (
        f'<img class="photo" src="{photo}" alt="the image as the model sees it">'
        f'<img class="over" src="{data_address(over)}" alt="{alt}">'
    )


def example_row(images: Sequence[Image.Image], chosen: int | None) -> str:
    """Thumbnails to choose from, and a file field for an image of one's own."""
    parts = ['<div class="examples" role="group" aria-label="Images">']
    for number, image in enumerate(images):
        small = image.copy()
        small.thumbnail((THUMBNAIL, THUMBNAIL))
        picture = f'<img src="{data_address(small)}" alt="example {number + 1}">'
        parts.append(_button("example", number, number == chosen, picture))
    parts.append(
        '<label class="upload">your own image<input type="file" accept="image/png,image/jpeg,image/webp"></label></div>'
    )
    return "".join(parts)


def plain_image(image: Image.Image) -> str:
    """An image before a question was asked about it."""
    return (
        f'<div class="patches"><img class="photo" src="{data_address(image)}" alt="the chosen image"></div>'
        '<p class="readout">Ask a question to look inside.</p>'
    )


def token_row(words: Sequence[str], chosen: int | None) -> str:
    """The answer, a button a token."""
    if not words:
        return '<div class="answer"></div>'
    buttons = "".join(_button("token", place, place == chosen, escape(word)) for place, word in enumerate(words))
    return (
        '<p class="note">The answer: choose a token to see where the model looks when it says it.</p>'
        f'<div class="answer" role="group" aria-label="Answer, token by token">{buttons}</div>'
    )


def patch_view(reading: Reading, state: ViewState) -> str:
    """The image under the attention of the chosen token, with its sinks, the region, and what every patch says."""
    values = reading.attention_map(state.token, state.layer, state.head)
    top = largest(values)
    sinks = reading.sink_map(state.layer)
    whose = "mean over heads" if state.head is None else f"head {state.head}"
    word = reading.words[state.token]
    heads = slice(None) if state.head is None else state.head
    share = float(reading.on_image(state.token)[state.layer, heads].sum(-1).mean())
    first = float(reading.on_first_token(state.token)[state.layer, heads].mean())
    note = (
        f"Layer {state.layer}, {whose}, for “{escape(word)}”: {share:.1%} of the attention is on the image, "
        f"{first:.1%} on the first token of the prompt (the usual sink). Darkest: {top:.2%} on one patch."
    )
    if sinks.any():
        note += " Blue frames: attention sinks, to which many times an even share goes."
    if not reading.grid.placed:
        note += " Where this model's patches lie in the image is not known: they are shown in their order."
    rows, columns = reading.grid.shape
    photo = data_address(Image.fromarray(reading.grid.image))
    cells = _cells(reading, state, values, sinks)
    return (
        f'<div class="patches" data-rows="{rows}" data-columns="{columns}">'
        f"{_under(photo, heat(values, top), 'attention over the image')}"
        f'<div class="cells" style="grid-template:repeat({rows},1fr)/repeat({columns},1fr)">{cells}</div></div>'
        f'<p class="readout" aria-live="polite">Point at a patch to read it; drag over patches to choose a region.</p>'
        f'<p class="note">{note}</p>'
    )


def _cells(reading: Reading, state: ViewState, values: npt.NDArray[Any], sinks: npt.NDArray[np.bool_]) -> str:
    words = reading.lens_words[state.layer + 1]
    probability = reading.lens.probabilities[0, state.layer + 1].cpu()
    parts = []
    for (row, column), patch in np.ndenumerate(reading.grid.numbers):
        said = zip(words[patch], probability[patch].tolist(), strict=True)
        says = ", ".join(f"“{word or ' '}” {share:.0%}" for word, share in said)
        sink = ", a sink" if sinks[row, column] else ""
        text = (
            f"Row {row}, column {column}{sink}: {values[row, column]:.2%} of the attention. "
            f"After layer {state.layer} it says {says}."
        )
        kinds = [name for name, on in (("sink", sink), ("chosen", _inside(state.region, row, column))) if on]
        parts.append(
            f'<i data-row="{row}" data-column="{column}" class="{" ".join(kinds)}" data-says="{escape(text)}"></i>'
        )
    return "".join(parts)


def _inside(region: tuple[int, int, int, int] | None, row: int, column: int) -> bool:
    return region is not None and region[0] <= row <= region[2] and region[1] <= column <= region[3]


def head_row(reading: Reading, state: ViewState) -> str:
    """One small map a head, and one of their mean, on one scale; the chosen one is pressed."""
    found = reading.on_image(state.token)[state.layer]
    top = largest(found)
    maps = [(None, "mean", found.mean(0)), *((head, f"head {head}", each) for head, each in enumerate(found))]
    parts = ['<div class="heads" role="group" aria-label="Heads">']
    for head, name, values in maps:
        picture = data_address(heat(reading.grid.arrange(values), top))
        inner = f'<img src="{picture}" alt=""><span>{name}</span><span>{values.sum():.0%}</span>'
        parts.append(_button("head", "" if head is None else head, head == state.head, inner))
    return "".join([*parts, '</div><p class="note">Each head, on one scale; share of its attention on the image.</p>'])


def layer_bars(reading: Reading, state: ViewState) -> str:
    """How much of the chosen token's attention is on the image in each layer; a click chooses the layer."""
    found = reading.on_image(state.token).sum(-1)
    share = found.mean(1) if state.head is None else found[:, state.head]
    most = largest(share)
    parts = ['<div class="bars" role="group" aria-label="Share of the attention on the image, by layer">']
    for layer, value in enumerate(share.tolist()):
        bar = f'<b style="height:{100 * value / most:.1f}%"></b><span>{layer}</span>'
        said = f"layer {layer}: {value:.1%} of the attention on the image"
        parts.append(_button("layer", layer, layer == state.layer, bar, said))
    note = f"Share of the attention on the image in each layer; the tallest bar is {most:.1%}."
    return "".join([*parts, f'</div><p class="note">{note}</p>'])


def _spoken(words: Sequence[str], answer: AlteredAnswer) -> str:
    parts = []
    for place, word in enumerate(words):
        mark = ' class="changed"' if place == answer.changed else ""
        parts.append(f"<span{mark}>{escape(word)}</span>")
    return "".join(parts) + ("" if answer.complete else "<span>\N{HORIZONTAL ELLIPSIS}</span>")


def exit_panel(reading: Reading, exit_layer: int, answer: AlteredAnswer, words: Sequence[str], cost: float) -> str:
    """The answer if the image leaves at exit layer k."""
    last = reading.num_layers
    change = float((reading.sweep.token_nll[0, last] - reading.sweep.token_nll[0, exit_layer]).nansum())
    said = "the same answer" if answer.changed is None else "another answer"
    seen = f"{exit_layer} of {last} layers see the image"
    rest = " The sweep knows the answer up to the first token that changes; “Write it out” generates the rest."
    return (
        f'<div class="result"><p class="spoken">{_spoken(words, answer)}</p>'
        f"<p>{seen}: {said}. log p of the full model's answer changes by {signed(change, 2)} nats; the decoder's "
        f"prefill costs {cost:.0%} of the full one.{'' if answer.complete else rest}</p></div>"
    )


def method_panel(reading: Reading, found: MethodAnswer, name: str, words: Sequence[str]) -> str:
    """Which patches a method keeps, one picture for each run of layers that see the same, and what is then answered."""
    same = "The same answer" if found.ids == reading.answer_ids[0].tolist() else "Another answer"
    spoken = "".join(f"<span>{escape(word)}</span>" for word in words)
    photo = data_address(Image.fromarray(reading.grid.image))
    pictures = "".join(
        f'<figure><div class="patches still">'
        f"{_under(photo, veil(reading.grid.arrange(kept)), 'white: patches that are gone')}"
        f"</div><figcaption>{layers_text(first, last)}: {int(kept.sum())} of {len(kept)} patches</figcaption></figure>"
        for first, last, kept in stages_of(found.kept.numpy())
    )
    return (
        f'<div class="result"><p class="spoken">{spoken}</p><p>{same}. {escape(name)} ({escape(found.setting)}): the '
        f'prefill costs {found.cost:.0%} of the full one.</p><div class="stages">{pictures}</div></div>'
    )


def stages_of(kept: npt.NDArray[np.bool_]) -> list[tuple[int, int, npt.NDArray[np.bool_]]]:
    """Runs of layers that see the same patches: first and last layer, and which [V].

    Example:
        >>> [(first, last) for first, last, _ in stages_of(np.array([[True], [True], [False]]))]
        [(0, 1), (2, 2)]
    """
    starts = [layer for layer in range(len(kept)) if layer == 0 or (kept[layer] != kept[layer - 1]).any()]
    return [(first, last - 1, kept[first]) for first, last in zip(starts, [*starts[1:], len(kept)], strict=True)]


def layers_text(first: int, last: int) -> str:
    """A run of layers in words."""
    return f"layer {first}" if first == last else f"layers {first} to {last}"


def cut_panel(found: CutAnswer, words: Sequence[str], what: str) -> str:
    """What becomes of the answer when a path is cut."""
    said = "The answer stays" if found.answer.changed is None else "The answer changes"
    return (
        f'<div class="result"><p class="spoken">{_spoken(words, found.answer)}</p>'
        f"<p>{escape(what)}. {said}: log p of the full model's answer changes by "
        f"{signed(found.log_probability_change, 2)} nats, the probability of its first token by "
        f"{signed(found.first_token_change, 0)}%.</p></div>"
    )


def signed(value: float, digits: int) -> str:
    """A change with its sign; one that rounds to nothing has none.

    Example:
        >>> signed(-0.004, 2), signed(-0.4, 1), signed(3, 0)
        ('0.00', '-0.4', '+3')
    """
    rounded = round(value, digits) + 0.0  # -0.0 + 0.0 is 0.0
    return f"{rounded:+.{digits}f}" if rounded else f"{rounded:.{digits}f}"


def notice(text: str, stale: bool = False) -> str:
    """A sentence about what went wrong or is to be done; `stale` where the panels are of something else."""
    return f'<p class="notice{" stale" if stale else ""}" role="status">{escape(text)}</p>'


def download(name: str, kind: str, content: bytes, label: str) -> str:
    """A link that saves `content` as a file; the server keeps none."""
    return f'<a class="download" download="{escape(name)}" href="{data_url(content, kind)}">{escape(label)}</a>'
