"""What "works" means for an architecture: each check returns the largest difference from a plain computation.

Every check runs two prompts of different lengths, with images of different sizes, as one batch padded on the left, and
compares each row with that row alone (`reference.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

import dyvte
from dyvte.batch import Batch
from dyvte.mllm import MLLM
from dyvte.policies.base import Policy, Prefill

from .reference import logits_alone, logits_cut
from .specimens import Row, make_inputs, rows_for

NEW_TOKENS = 3
"""Tokens that the check of generation asks for."""

NO_SUCH_TOKEN = 10_000
"""An end token that is never generated."""


@dataclass
class LeaveAt(Policy):
    """Every visual token of every row leaves before a layer of its own; those of L stay."""

    layers: tuple[tuple[int, ...], ...]

    def before_layer(self, layer: int, prefill: Prefill) -> None:
        """Let those leave whose layer this is."""
        leaving = torch.zeros_like(prefill.kept)
        for row, of_row in enumerate(self.layers):
            leaving[row, prefill.layout.visual[row]] = torch.tensor(of_row) == layer
        prefill.drop(leaving)


@dataclass
class Subject:
    """A model under examination, with two prompts and what is known about them already.

    Attributes:
        mllm: the model.
    """

    mllm: MLLM
    _known: dict[tuple[int, tuple[int, ...]], Tensor] = field(default_factory=dict)

    @cached_property
    def rows(self) -> list[Row]:
        """The prompts."""
        return rows_for(self.mllm.model.config.model_type)

    def batch(self) -> Batch:
        """The prompts as one batch, padded on the left."""
        return self.batch_of(self.rows)

    def batch_of(self, rows: list[Row]) -> Batch:
        """Some prompts as one batch."""
        return self.mllm.batch(**make_inputs(self.mllm.model, rows))

    @cached_property
    def tokens(self) -> list[int]:
        """Number of visual tokens of every row."""
        return self.batch().layout.visual.sum(1).tolist()

    def alone(self, leaves: Sequence[Sequence[int]]) -> Tensor:
        """Last logits [B, vocabulary] of every row alone, its visual tokens leaving before layers of their own."""
        found = []
        for index, (row, of_row) in enumerate(zip(self.rows, leaves, strict=True)):
            name = (index, tuple(of_row))
            if name not in self._known:
                self._known[name] = logits_alone(self.mllm, self.batch_of([row]), of_row)[-1]
            found.append(self._known[name])
        return torch.stack(found)

    def exits_alone(self, layers: Sequence[int]) -> Tensor:
        """Like `alone`, all visual tokens of a row leaving at its exit."""
        return self.alone([[k] * count for k, count in zip(layers, self.tokens, strict=True)])


def _largest(difference: Tensor) -> float:
    return float(difference.abs().max())


@torch.no_grad()
def probe(subject: Subject) -> float:
    """Under the probe logits are the model's bit for bit; masses between roles are those of eager attention's maps."""
    mllm = subject.mllm
    plain = mllm.model(**subject.batch(), use_cache=False).logits
    with dyvte.AttentionProbe(mllm) as watching:
        watched = mllm.model(**subject.batch(), use_cache=False).logits
    if not torch.equal(plain, watched):
        return float("inf")
    before = mllm.text_config._attn_implementation
    mllm.model.set_attn_implementation("eager")
    maps: dict[int, Tensor] = {}
    handles = [
        module.register_forward_hook(lambda module, args, output, index=index: maps.__setitem__(index, output[1]))
        for index, module in enumerate(mllm.attentions)
        if module is not None
    ]
    try:
        mllm.model(**subject.batch(), use_cache=False)
    finally:
        mllm.model.set_attn_implementation(before)
        for handle in handles:
            handle.remove()
    roles = torch.nn.functional.one_hot(subject.batch().layout.roles + 1, 5)[..., 1:].float()  # [B, N, 4]
    worst = 0.0
    for index, of_layer in maps.items():
        if of_layer is None:  # no attention in this layer
            continue
        sums = torch.einsum("bnq,bhnm,bmk->bhqk", roles, of_layer[..., -roles.shape[1] :].float(), roles)
        expected = sums / roles.sum(1)[:, None, :, None]
        found = watching.stats.mass[:, index, : expected.shape[1]]
        present = (roles.sum(1) > 0)[:, None, :, None] & (roles.sum(1) > 0)[:, None, None]
        worst = max(worst, _largest((found - expected)[present.expand_as(found)]))
    return worst if maps else float("inf")


@torch.no_grad()
def exits(subject: Subject) -> float:
    """`FixedExit` at 0, 1, L - 1 and L."""
    last, worst = subject.mllm.num_layers, 0.0
    for k in sorted({0, 1, last - 1, last}):
        with dyvte.FixedExit(k)(subject.mllm):
            found = subject.mllm.model(**subject.batch(), use_cache=False).logits[:, -1]
        worst = max(worst, _largest(found - subject.exits_alone([k] * len(found))))
    return worst


@torch.no_grad()
def sweep(subject: Subject) -> float:
    """`exit_sweep` at every exit."""
    found = dyvte.exit_sweep(subject.mllm, subject.batch()).logits
    return max(_largest(found[:, k] - subject.exits_alone([k] * len(found))) for k in range(found.shape[1]))


def _under(subject: Subject, leaves: tuple[tuple[int, ...], ...]) -> float:
    with LeaveAt(leaves)(subject.mllm):
        found = subject.mllm.model(**subject.batch(), use_cache=False).logits[:, -1]
    return _largest(found - subject.alone(leaves))


@torch.no_grad()
def mixed_exits(subject: Subject) -> float:
    """An exit of its own for each row of a batch."""
    last = subject.mllm.num_layers
    return _under(subject, tuple((k,) * count for k, count in zip((1, last - 1), subject.tokens, strict=False)))


@torch.no_grad()
def kept_tokens(subject: Subject) -> float:
    """Every second visual token leaves at layer 1, the others before the last layer or never."""
    last = subject.mllm.num_layers
    later = (last, last - 1)
    of_rows = zip(subject.tokens, later, strict=False)
    return _under(subject, tuple(tuple((1, late)[i % 2] for i in range(count)) for count, late in of_rows))


@torch.no_grad()
def generation(subject: Subject) -> float:
    """Logits of tokens that a batch generates under an exit, against each row's prompt and answer in one forward."""
    mllm, k = subject.mllm, 1
    batch = subject.batch()
    visual = [each for each in mllm.visual_token_ids if each < mllm.lm_head.weight.shape[0]]
    with dyvte.FixedExit(k)(mllm):
        output = mllm.model.generate(
            **batch,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=[NO_SUCH_TOKEN],
            pad_token_id=0,
            suppress_tokens=visual or None,
            return_dict_in_generate=True,
            output_logits=True,
        )
    found, worst = torch.stack(output.logits, dim=1), 0.0
    for index, row in enumerate(subject.rows):
        whole = mllm.append_answers(subject.batch_of([row]), output.sequences[index : index + 1, -NEW_TOKENS:])
        expected = logits_alone(mllm, whole, [k] * subject.tokens[index])[-NEW_TOKENS - 1 : -1]
        worst = max(worst, _largest(found[index] - expected))
    return worst


@torch.no_grad()
def lens(subject: Subject) -> float:
    """After the last layer the logit lens reads what the model says."""
    batch = subject.batch()
    expected = subject.mllm.model(**batch, use_cache=False).logits[:, -1].softmax(-1).amax(-1)
    found = dyvte.logit_lens(subject.mllm, subject.batch(), positions="last", top=1)
    return _largest(found.probabilities[:, -1, 0, 0] - expected)


@torch.no_grad()
def knock_out(subject: Subject) -> float:
    """No instruction token sees the image from layer 1 on."""
    mllm = subject.mllm
    layers = range(1, mllm.num_layers)
    window = (layers.start, layers.stop)
    found = dyvte.knockout(mllm, subject.batch(), paths=[("instruction", "visual")], windows=[window]).logits
    assert found is not None
    expected = []
    for row in subject.rows:
        batch = subject.batch_of([row])
        layout = batch.layout
        expected.append(logits_cut(mllm, batch, layout.instruction[0], layout.visual[0], layers)[-1])
    return _largest(found[:, 0, 0] - torch.stack(expected))


CHECKS: dict[str, Callable[[Subject], float]] = {
    "probe": probe,
    "exits": exits,
    "sweep": sweep,
    "mixed exits": mixed_exits,
    "kept tokens": kept_tokens,
    "generation": generation,
    "lens": lens,
}
"""By name; what they return must be below `TOLERANCE`."""

CAUSES: dict[str, Callable[[Subject], float]] = {"knock-out": knock_out}
"""Likewise; an architecture works without them."""

QUICK = ("probe", "sweep", "kept tokens", "generation")
"""Those of CI, with `CAUSES`; `make zoo` runs all."""

TOLERANCE = 1e-4
"""Largest difference that counts as equal, of logits in float32 with random weights."""


def outcome(check: Callable[[Subject], float], subject: Subject) -> float | str:
    """What a check found, or the error that ended it."""
    try:
        return check(subject)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
