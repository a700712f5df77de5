"""Groups of positions between which a path runs, and what is done to a path."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dyvte.errors import ConfigError
from dyvte.layout import TokenLayout

GROUPS = ("system", "visual", "question", "last", "instruction")
"""Names of the position groups.

`question` is the text after the last visual position without the last prompt token, `last` the last prompt token and
all teacher-forced answer tokens, `instruction` both. Text between two images belongs to none of them.
"""

Mode = Literal["cut", "mean", "swap"]
MODES: tuple[Mode, ...] = ("cut", "mean", "swap")


def group_masks(layout: TokenLayout) -> dict[str, Tensor]:
    """Members [B, N] of each of `GROUPS`."""
    position = torch.arange(layout.roles.shape[1], device=layout.roles.device)
    last = layout.answer | (position == layout.last_prompt[:, None])
    question = layout.text_status_positions & ~last
    return {
        "system": layout.system,
        "visual": layout.visual,
        "question": question,
        "last": last,
        "instruction": question | last,
    }


@dataclass(frozen=True, eq=False)
class Intervention:
    """What happens to one path in the layers of its window.

    Attributes:
        queries, keys: [B, N] the positions that attend and those that they attend to.
        mode: "cut" masks these pairs before the softmax; "mean" and "swap" put other keys and values there.
        donors: [B] row whose image each row gets ("swap").
    """

    queries: Tensor
    keys: Tensor
    mode: Mode = "cut"
    donors: Tensor | None = None


def interventions(
    layout: TokenLayout, paths: list[tuple[str, str]], key_sets: Mapping[str, Tensor], mode: Mode, donors: Tensor | None
) -> list[Intervention]:
    """One intervention a path.

    Raises:
        ConfigError: an unknown group, or a path whose keys cannot be replaced.
    """
    groups = group_masks(layout)
    found = []
    for path in paths:
        queries, keys = path
        if queries not in groups:
            raise ConfigError(f"path {queries} -> {keys}: no query group {queries!r}; choose from {', '.join(GROUPS)}")
        known = {**groups, **key_sets}
        if keys not in known:
            raise ConfigError(f"path {queries} -> {keys}: no key group {keys!r}; choose from {', '.join(known)}")
        if mode != "cut":
            if queries not in ("instruction", "last"):
                raise ConfigError(
                    f"path {queries} -> {keys}: keys and values are replaced for all later tokens alike; {mode!r} "
                    "takes the query group 'instruction' or 'last'"
                )
            if (known[keys] & ~layout.visual).any():
                raise ConfigError(
                    f"path {queries} -> {keys}: {mode!r} replaces visual keys only, {keys!r} holds others"
                )
        found.append(Intervention(groups[queries], known[keys], mode, donors))
    return found


def check_donors(layout: TokenLayout, donors: Tensor) -> None:
    """Refuse donors whose image does not stand where the receiver's does.

    Raises:
        ConfigError: with both rows.
    """
    places = _visual_places(layout)
    for row, donor in enumerate(donors.tolist()):
        if not 0 <= donor < len(donors):
            raise ConfigError(f"donors: row {row} has donor {donor}, the batch has rows 0..{len(donors) - 1}")
        mine, theirs = places[row], places[donor]
        if mine != theirs:
            raise ConfigError(
                f"donors: the visual tokens of rows {row} and {donor} do not stand at the same places "
                f"({len(mine)} and {len(theirs)} tokens); swap images of one size under one system prompt"
            )


def _visual_places(layout: TokenLayout) -> list[list[int]]:
    """How far the visual tokens of every row are from its first token."""
    place = torch.arange(layout.roles.shape[1], device=layout.roles.device) - layout.first_token[:, None]
    return [of_row[visual].tolist() for of_row, visual in zip(place, layout.visual, strict=True)]


def find_donors(layout: TokenLayout, images: Sequence[object]) -> list[int]:
    """For each row the next one whose image is another and stands at the same places; the row itself where none is.

    Args:
        layout: of the batch.
        images: [B] what tells the images of the rows apart.
    """
    places, donors = _visual_places(layout), []
    for row in range(len(places)):
        order = [(row + step) % len(places) for step in range(1, len(places))]
        fits = (each for each in order if images[each] != images[row] and places[each] == places[row])
        donors.append(next(fits, row))
    return donors
