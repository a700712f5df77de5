"""The answer of an altered model: without its image from a layer on, with a path cut, under a method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dyvte.batch import Batch
from dyvte.cost.spent import SeenPositions
from dyvte.errors import ConfigError
from dyvte.instrument.causal import GROUPS, Knockout, knockout
from dyvte.instrument.sweep import ExitSweep
from dyvte.mllm import MLLM
from dyvte.policies.exits.fixed_exit import FixedExit
from dyvte.policies.method import Calibration
from dyvte.policies.registry import methods

from ..measuring.methods import budgeted_methods, describe, policy_at

REGION = "region"
"""Name of the key group of the patches that were drawn around."""

QUERY_GROUPS = tuple(name for name in GROUPS if name != "system")
KEY_GROUPS = (REGION, *GROUPS)


@dataclass(frozen=True)
class AlteredAnswer:
    """What an altered model answers.

    Attributes:
        ids: its greedy answer, as far as it is known.
        complete: False where only the tokens up to the first one that changed are known.
        changed: index of the first token that differs from the full model's; None where none does.
    """

    ids: list[int]
    complete: bool
    changed: int | None


def answer_from_argmax(
    answer: Sequence[int], argmax: Sequence[int], full_argmax: Sequence[int], end_ids: Sequence[int]
) -> AlteredAnswer:
    """What an altered model generates, as far as teacher-forcing the full model's answer tells.

    Up to the first token that differs both have read the same text, so these tokens, and the one that differs, are what
    the altered model generates. What follows would be read after another text.

    Args:
        answer: [A] the full model's greedy answer.
        argmax: [A] the altered model's likeliest token at each of its positions.
        full_argmax: [A] the full model's in the same pass; where two tokens tie it may differ from `answer`, and either
            is then the full model's choice.

    Example:
        >>> answer_from_argmax([5, 6, 2], [5, 7, 2], [5, 6, 2], end_ids=[2])
        AlteredAnswer(ids=[5, 7], complete=False, changed=1)
        >>> answer_from_argmax([5, 6, 2], [5, 2, 2], [5, 6, 2], end_ids=[2])
        AlteredAnswer(ids=[5, 2], complete=True, changed=1)
    """
    for place, (full, new, tie) in enumerate(zip(answer, argmax, full_argmax, strict=True)):
        if new not in (full, tie):
            return AlteredAnswer([*answer[:place], new], new in end_ids, place)
    return AlteredAnswer(list(answer), True, None)


def exit_answer(sweep: ExitSweep, exit_layer: int, end_ids: Sequence[int]) -> AlteredAnswer:
    """The answer if the image leaves at exit layer k, read off a sweep of one question; no model is run."""
    argmax = sweep.token_argmax[0]
    return answer_from_argmax(sweep.answer_ids[0].tolist(), argmax[exit_layer].tolist(), argmax[-1].tolist(), end_ids)


def write_out_exit(mllm: MLLM, batch: Batch, exit_layer: int, max_new_tokens: int) -> list[int]:
    """The whole answer if the image leaves at exit layer k, generated."""
    with FixedExit(layer=exit_layer)(mllm):
        return mllm.generate_ids(batch, max_new_tokens=max_new_tokens)[0]


@dataclass(frozen=True)
class CutAnswer:
    """The answer with a path cut.

    Attributes:
        log_probability_change: of the full model's answer, in nats; negative where the path was of use.
        first_token_change: relative change of the probability of its first token, in percent.
    """

    answer: AlteredAnswer
    log_probability_change: float
    first_token_change: float


@torch.no_grad()
def cut_answer(
    mllm: MLLM,
    batch: Batch,
    answer_ids: Tensor,
    path: tuple[str, str],
    window: tuple[int, int],
    patches: Sequence[int],
    end_ids: Sequence[int],
    max_new_tokens: int,
) -> CutAnswer:
    """Cut a path and say what becomes of the answer (Geva et al. 2023, arXiv 2304.14767; `dyvte.knockout`).

    The new answer is decoded greedily by teacher-forcing what is known of it again: each pass settles all tokens up to
    the next change, and a guess that holds costs nothing.

    Args:
        answer_ids: [1, A] the full model's greedy answer.
        path: one of `QUERY_GROUPS`, one of `KEY_GROUPS`.
        window: [s, e): cut in layers s..e-1.
        patches: numbers of the visual tokens in the region, where the path's keys are the region.

    Raises:
        ConfigError: an unknown group, a window that does not fit, or an empty region.
    """
    regions = {REGION: region_mask(batch, patches)} if path[1] == REGION else None

    def cut(ids: Tensor) -> Knockout:
        return knockout(mllm, batch, ids, [path], [window], key_sets=regions, keep_logits=False)

    def likeliest(ids: list[int]) -> list[int]:
        return cut(answer_ids.new_tensor([ids])).token_argmax[0, 0, 0].tolist()

    own, found = answer_ids[0].tolist(), cut(answer_ids)
    argmax, full_argmax = found.token_argmax[0, 0, 0].tolist(), found.full_token_argmax[0].tolist()
    answer = answer_from_argmax(own, argmax, full_argmax, end_ids)
    if not answer.complete:
        ids = _decode(answer.ids, own, likeliest, end_ids, max_new_tokens)
        answer = AlteredAnswer(ids, True, answer.changed)
    return CutAnswer(answer, float(found.log_probability_change[0, 0, 0]), float(found.first_token_change[0, 0, 0]))


def region_mask(batch: Batch, patches: Sequence[int]) -> Tensor:
    """[1, N] the positions of some visual tokens of one prompt."""
    places = batch.layout.visual[0].nonzero()[:, 0]
    if not patches:
        raise ConfigError("the region holds no patch: draw a rectangle over the image first")
    if min(patches) < 0 or max(patches) >= len(places):
        raise ConfigError(f"the region names patch {max(patches)}; the image has patches 0 to {len(places) - 1}")
    mask = torch.zeros_like(batch.layout.visual)
    mask[0, places[torch.tensor(sorted(set(patches)), device=places.device)]] = True
    return mask


def _decode(
    known: Sequence[int],
    guess: Sequence[int],
    read: Callable[[list[int]], list[int]],
    end_ids: Sequence[int],
    max_new_tokens: int,
) -> list[int]:
    """Greedy decoding from passes over a guess.

    Args:
        known: tokens that are settled.
        guess: what may follow them, place for place.
        read: gives the likeliest token at each place of a teacher-forced text.
    """
    settled = list(known)
    while len(settled) < max_new_tokens and settled[-1] not in end_ids:
        tried = [*settled, *(guess[len(settled) : max_new_tokens] or end_ids[:1] or settled[-1:])]
        for new, old in zip(read(tried)[len(settled) :], tried[len(settled) :], strict=True):
            settled.append(new)
            if new != old or new in end_ids:
                break
    return settled


def known_methods() -> list[str]:
    """Methods that meet a budget without gates, which belong to one model."""
    return [name for name in budgeted_methods() if "gates" not in methods()[name].needs]


@dataclass(frozen=True)
class MethodAnswer:
    """One question under a method.

    Attributes:
        kept: [L, V] whether layer l sees visual token v.
        cost: decoder FLOPs of the prefill over the full model's.
    """

    setting: str
    kept: Tensor
    ids: list[int]
    cost: float


@torch.no_grad()
def method_answer(mllm: MLLM, batch: Batch, method: str, budget: float, max_new_tokens: int) -> MethodAnswer | None:
    """One question under a method that costs `budget` of the full model's decoder FLOPs; None where it cannot.

    What a method is set by (a share of tokens, a recipe, a layer) is solved for on this very prompt, without its
    answer.
    """
    if method not in known_methods():
        raise ConfigError(f"no method {method!r}; choose from {', '.join(known_methods())}")
    if not 0 < budget <= 1:
        raise ConfigError(f"the budget is {budget}; give a share of the full model's cost, above 0 and up to 1")
    calibration = Calibration(mllm, [batch])
    policy = policy_at(method, budget, calibration)
    if policy is None:
        return None
    seen = SeenPositions()
    with policy(mllm), seen(mllm):
        ids = mllm.generate_ids(batch, max_new_tokens=max_new_tokens)[0]
    kept = torch.stack(seen.masks, dim=1)[0, :, batch.layout.visual[0]].cpu()
    return MethodAnswer(describe(policy), kept, ids, calibration.cost(kept.double().mean(1).tolist()))
