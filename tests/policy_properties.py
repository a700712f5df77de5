"""What holds of every policy that takes visual tokens out, whichever file tests it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from families import random_batch

from dyvte.batch import Batch
from dyvte.mllm import MLLM
from dyvte.policies.base import Policy

EXACT = 1e-4
IMAGES = (1, 2, 0)


def in_turn(names: Iterable[str], families: Sequence[str], each: int = 2) -> list[tuple[str, str]]:
    """Every name with so many of the families, which take turns: each family comes equally often, up to one.

    For generation under methods that only leave positions out: what they leave out is tested in every family with every
    method, and that generated tokens see what stayed does not depend on how it was chosen.
    """
    return [
        (name, families[(index * each + turn) % len(families)])
        for index, name in enumerate(names)
        for turn in range(each)
    ]


def mixed_batch(mllm: MLLM, side: str = "left", seed: int = 1) -> Batch:
    """Rows with one image, two, and none."""
    return random_batch(mllm, torch.Generator().manual_seed(seed), IMAGES, side)


@torch.no_grad()
def check_rows_do_not_depend_on_their_batch_or_padding(policy: Callable[[], Policy], mllm: MLLM) -> None:
    """A row's text comes out as it does alone, and with padding on either side."""
    left, right = (mixed_batch(mllm, side) for side in ("left", "right"))
    with policy()(mllm):
        together, padded_right = mllm(**left).logits, mllm(**right).logits
        for row in range(len(IMAGES)):
            kept = ~left.layout.padding[row]
            alone = left[[row]]
            pixels = {name: value for name, value in alone.items() if name == "pixel_values"}
            logits = mllm(input_ids=alone["input_ids"][:, kept], **pixels).logits[0]
            text = left.layout.text[row][kept]
            torch.testing.assert_close(together[row, kept][text], logits[text], atol=EXACT, rtol=0)
            other = padded_right[row, ~right.layout.padding[row]]
            torch.testing.assert_close(other[text], logits[text], atol=EXACT, rtol=0)


@torch.no_grad()
def check_it_changes_prompts_with_an_image_only(
    policy: Callable[[], Policy], mllm: MLLM, changes_text_too: bool = False
) -> None:
    """The next token's logits move where there is an image; elsewhere they stay."""
    batch = mixed_batch(mllm)
    plain = mllm(**batch).logits[:, -1]
    with policy()(mllm):
        changed = mllm(**batch).logits[:, -1]
    difference = (plain - changed).abs().amax(1)
    assert (difference[:2] > 10 * EXACT).all()
    if not changes_text_too:
        assert difference[2] < EXACT
