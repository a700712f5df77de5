"""What the answer becomes when a path through attention is cut in a window of layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from dyvte.batch import IGNORE_INDEX, Batch
from dyvte.errors import ConfigError, ModelError, UnsupportedError
from dyvte.instrument.causal.branches import NOTHING, Branches
from dyvte.instrument.causal.groups import MODES, Mode, check_donors, interventions
from dyvte.instrument.causal.readout import LOGITS_AT_ONCE, read_out
from dyvte.instrument.hooks import check_model, is_driven
from dyvte.instrument.keys.shared import borrows_keys
from dyvte.instrument.sweep.answers import teacher_forced
from dyvte.mllm import MLLM
from dyvte.model_parts import INDEXERS_BY_KEY, indexer_of

Window = tuple[int, int]


@dataclass
class Knockout:
    """The answer under every path and window. B samples, P paths, W windows, A answer tokens.

    Attributes:
        paths: (queries, keys) of each path, and `windows` [s, e) of each window, as they were asked for.
        answer_ids: [B, A] the teacher-forced answer, -100 at padding. Without one, the full model's next token (A = 1).
        logits: [B, P, W, vocab] next-token logits at the prompt's end, float32; None where they were not kept.
        token_argmax: [B, P, W, A] most likely token at every answer position; -100 at padding.
        token_nll: [B, P, W, A] negative log-likelihood of the answer's token in nats; NaN at padding.
        nll: [B, P, W] mean of `token_nll`.
        agree: [B, P, W] whether every argmax is the answer's token: if the answer is the full model's greedy one with
            its end token, whether the cut model generates the same answer.
        full_logits, full_token_argmax, full_token_nll: the same of the model left alone, without P and W.

    Example:
        >>> cut = dyvte.knockout(mllm, batch, paths=[("instruction", "visual")], windows=[(0, 4), (8, 12)])
        >>> cut.agree.shape  # [B, P, W]
        torch.Size([2, 1, 2])
    """

    paths: list[tuple[str, str]]
    windows: list[Window]
    answer_ids: Tensor
    logits: Tensor | None
    token_argmax: Tensor
    token_nll: Tensor
    nll: Tensor
    agree: Tensor
    full_logits: Tensor
    full_token_argmax: Tensor
    full_token_nll: Tensor

    @property
    def log_probability_change(self) -> Tensor:
        """[B, P, W] change of log p(answer), the sum over its tokens, in nats; negative where the path was of use."""
        return (self.full_token_nll[:, None, None] - self.token_nll).nansum(-1)

    @property
    def first_token_change(self) -> Tensor:
        """[B, P, W] relative change of the probability of the answer's first token, in percent (Geva et al. 2023)."""
        return 100 * torch.expm1(self.full_token_nll[:, None, None, 0] - self.token_nll[..., 0])

    def up_to_ties(self) -> Knockout:
        """The same results with agreement up to ties, for answers that are the full model's own greedy ones.

        Generation and this pass round differently: where two tokens tie, the full model may prefer the other one here.
        Either is then its choice.
        """
        valid = (self.answer_ids != IGNORE_INDEX)[:, None, None]
        same = self.token_argmax == self.answer_ids[:, None, None]
        same |= self.token_argmax == self.full_token_argmax[:, None, None]
        return replace(self, agree=(same | ~valid).all(-1))

    def to(self, device: torch.device | str) -> Knockout:
        """The same results on another device."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        moved: dict[str, Any] = {name: value.to(device) for name, value in values.items() if isinstance(value, Tensor)}
        return replace(self, **moved)


def windows_of_width(num_layers: int, width: int) -> list[Window]:
    """Every window of `width` layers, the first one first.

    Example:
        >>> windows_of_width(4, 3)
        [(0, 3), (1, 4)]
    """
    if not 1 <= width <= num_layers:
        raise ConfigError(f"a window of {width} layers does not fit a model of {num_layers}; give 1 to {num_layers}")
    return [(first, first + width) for first in range(num_layers - width + 1)]


def all_windows(num_layers: int) -> list[Window]:
    """All L (L + 1) / 2 windows of at least one layer, ordered by entry, then exit.

    Example:
        >>> all_windows(2)
        [(0, 1), (0, 2), (1, 2)]
    """
    return [(entry, leave) for entry in range(num_layers) for leave in range(entry + 1, num_layers + 1)]


@torch.no_grad()
def knockout(
    mllm: MLLM,
    batch: Batch,
    answer_ids: Tensor | None = None,
    paths: Sequence[tuple[str, str]] = (("instruction", "visual"),),
    windows: Sequence[Window] = ((0, 4),),
    invert: bool = False,
    *,
    mode: Mode = "cut",
    donors: Sequence[int] | None = None,
    key_sets: Mapping[str, Tensor] | None = None,
    shared_image: Sequence[int] | None = None,
    keep_logits: bool = True,
    branch_tokens: int | None = None,
) -> Knockout:
    """Cut paths through attention in windows of layers, all of them in one forward pass.

    A path (a -> b) is cut in a window [s, e) by masking, in layers s..e-1 and before the softmax, the attention scores
    of the queries in group a for the keys in group b; what is left of a row is renormalised, and a query keeps itself
    (Geva et al. 2023, arXiv 2304.14767; Zhang et al. 2024, arXiv 2411.18620). The result is what one masked forward for
    each path and window gives, up to float rounding.

    In a hybrid model only the layers that attend (`mllm.attention_layers`) have scores to cut. The others run as ever:
    what their running state carries from the image to the question goes on, also within the window, and a window
    without any layer that attends changes nothing. A layer that borrows the keys of an earlier one (Gemma 3n, Gemma 4
    E2B and E4B) is cut in its own window only. One that chooses its keys one by one (DeepSeek's sparse attention)
    chooses among those that the cut leaves; one that chooses them in blocks or pools is refused.

    Args:
        mllm: the model, with sdpa or eager attention.
        batch: prompts from `encode` or `batch`, padded on either side. Answers that it was encoded with are scored.
        answer_ids: [B, A] answers to score, teacher-forced after the prompts, -100 at padding (on the right). None:
            only the next token after the prompt, the full model's own choice.
        paths: (queries, keys), each one of `dyvte.instrument.causal.GROUPS`: system, visual, question, last,
            instruction; keys also one of `key_sets`.
        windows: [s, e) with 0 <= s <= e <= L.
        invert: cut the path in every layer outside of the window, that is, leave it open inside only.
        mode: "cut"; or replace the visual keys and values that the path reads, which keeps the number of keys: by
            their mean over the row's visual positions ("mean"), or by those of the row's donor ("swap").
        donors: [B] row whose image each row gets, for "swap".
        key_sets: name -> bool [B, N], positions of the prompts: patches of an object, random positions; or
            [B, W, N], others for each window.
        shared_image: [B] equal numbers for rows that show the same images after the same system text: what they share
            runs once, in the main pass and in branches that change it (visual -> visual).
        keep_logits: False saves [B, P, W, vocab] floats.
        branch_tokens: bounds the memory of branches, changes no result. By default as much as the main pass.

    Raises:
        ConfigError: an unknown group, a window that does not fit, a key set of another shape.
        UnsupportedError: a policy is on, or `check_cuts` refuses the model.
        ValueError: answers that do not fit the batch.
        ModelError: NaN among the logits.

    Example:
        >>> cut = dyvte.knockout(mllm, batch, paths=[("last", "visual")], windows=[(0, 4), (4, 8)])
        >>> cut.agree.float().mean(0).shape  # [P, W]
        torch.Size([1, 2])
    """
    if is_driven(mllm):
        raise UnsupportedError("knockout drives the layers itself: call it outside of any `with policy(mllm):` block")
    check_cuts(mllm, mode)
    paths, windows = [(str(a), str(b)) for a, b in paths], [(int(s), int(e)) for s, e in windows]
    _check(mllm, batch, paths, windows, mode, donors, key_sets or {}, shared_image)

    # Key sets are padded and rolled along with the ids of the prompts.
    given_sets, cut_paths, action_of = _of_each_window(paths, len(windows), key_sets or {})
    carried = {f"key set {name}": members.to(mllm.device) for name, members in given_sets.items()}
    inputs, answers = teacher_forced(mllm, Batch({**batch, **carried}, batch.layout), answer_ids)
    if shared_image is not None:
        inputs = inputs.right_padded()  # the same image must stand at the same positions
    sets = {name: inputs[f"key set {name}"].bool() for name in given_sets}
    inputs = Batch({name: value for name, value in inputs.items() if name not in carried}, inputs.layout)
    given = None if donors is None else torch.tensor(list(donors), device=mllm.device)
    if given is not None:
        check_donors(inputs.layout, given)
    actions = interventions(inputs.layout, cut_paths, sets, mode, given)
    schedules = [
        [action if (start <= layer < stop) != invert else NOTHING for layer in range(mllm.num_layers)]
        for of_windows in action_of
        for action, (start, stop) in zip(of_windows, windows, strict=True)
    ]
    # Answer token j is predicted from the j-th position after the prompt's end.
    layout, width = inputs.layout, 1 if answers is None else answers.shape[1]
    positions = layout.last_prompt[:, None] + torch.arange(width, device=layout.roles.device)
    positions = positions.clamp(max=layout.roles.shape[1] - 1)
    branches = Branches(mllm, inputs, actions, schedules, positions, shared_image, branch_tokens)
    branches.run()
    return _score(mllm, branches, answers, paths, windows, keep_logits)


def check_cuts(mllm: MLLM, mode: Mode = "cut") -> None:
    """Refuse a model in which a path cannot be cut exactly, before anything is computed.

    Args:
        mllm: the model.
        mode: of `knockout`.

    Raises:
        UnsupportedError: its layers cannot be driven, choose their keys in blocks or pools, or (replacing keys) borrow
            or choose them.
    """
    check_model(mllm)
    for layer, attention in enumerate(mllm.attentions):
        indexer = indexer_of(attention)
        if indexer is not None and type(indexer).__name__ not in INDEXERS_BY_KEY:
            raise UnsupportedError(
                f"knockout: decoder layer {layer} chooses its keys in blocks or pools ({type(indexer).__name__}), of "
                "which no single pair of query and key can be cut; use FixedExit or exit_sweep"
            )
        if mode != "cut" and (indexer is not None or borrows_keys(attention)):
            raise UnsupportedError(
                f"knockout: decoder layer {layer} {'borrows' if indexer is None else 'chooses'} its keys, so they "
                f"cannot be replaced in some layers only; use mode 'cut', not {mode!r} (analysis.knockout: replace=[])"
            )


def _check(
    mllm: MLLM,
    batch: Batch,
    paths: Sequence[tuple[str, str]],
    windows: Sequence[Window],
    mode: Mode,
    donors: Sequence[int] | None,
    key_sets: Mapping[str, Tensor],
    shared_image: Sequence[int] | None,
) -> None:
    rows = len(batch["input_ids"])
    if not paths or not windows:
        raise ConfigError("knockout needs at least one path and one window")
    for start, stop in windows:
        if not 0 <= start <= stop <= mllm.num_layers:
            raise ConfigError(f"window [{start}, {stop}) does not fit the model's layers 0..{mllm.num_layers}")
    if mode not in MODES:
        raise ConfigError(f"mode is {mode!r}; choose from {', '.join(MODES)}")
    if (donors is not None) != (mode == "swap"):
        raise ConfigError("donors go with mode='swap', and it needs them: one row of the batch for each row")
    for name, given in (("donors", donors), ("shared_image", shared_image)):
        if given is not None and len(given) != rows:
            raise ConfigError(f"{name} has {len(given)} entries for {rows} rows")
    length = batch["input_ids"].shape[1]
    for name, members in key_sets.items():
        if members.shape not in ((rows, length), (rows, len(windows), length)):
            raise ConfigError(
                f"key set {name!r} is {tuple(members.shape)}, the prompts are {(rows, length)}"
                + (f" and there are {len(windows)} windows" if members.ndim == 3 else "")
            )


def _of_each_window(
    paths: list[tuple[str, str]], num_windows: int, key_sets: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[tuple[str, str]], list[list[int]]]:
    """Key sets [B, N] only, the paths between them, and for each path asked for that of these for every window."""
    sets: dict[str, Tensor] = {}
    parts: dict[str, list[str]] = {}
    for name, members in key_sets.items():
        if members.ndim == 3:
            parts[name] = [f"{name} in window {window}" for window in range(num_windows)]
            sets |= dict(zip(parts[name], members.unbind(1), strict=True))
        else:
            sets[name] = members
    cut: list[tuple[str, str]] = []
    action_of = []
    for queries, keys in paths:
        names = parts.get(keys, [keys])
        action_of.append([len(cut) + (window if keys in parts else 0) for window in range(num_windows)])
        cut += [(queries, name) for name in names]
    return sets, cut, action_of


def _score(
    mllm: MLLM,
    branches: Branches,
    answers: Tensor | None,
    paths: list[tuple[str, str]],
    windows: list[Window],
    keep_logits: bool,
) -> Knockout:
    states = branches.states()  # [P * W + 1, B, A, d]

    def logits_of(some: Tensor) -> Tensor:
        scores = read_out(mllm, branches.inputs, some.flatten(0, 1), branches.template).unflatten(0, some.shape[:2])
        if scores.isnan().any():
            row = int(scores.isnan().any(-1).any(-1).nonzero()[0, 1])
            raise ModelError(f"NaN among the logits of row {row}")
        return scores

    full = logits_of(states[-1:])[0]
    if answers is None:
        answers = full[:, :1].argmax(-1)
    valid = answers != IGNORE_INDEX
    token = answers.clamp(min=0)[..., None]

    def nll_of(scores: Tensor) -> Tensor:
        chosen = scores.gather(-1, token.expand(*scores.shape[:-1], 1))[..., 0]
        return (scores.logsumexp(-1) - chosen).masked_fill(~valid, torch.nan)

    at_once = max(1, LOGITS_AT_ONCE // full.numel())
    at_end, argmax, nll = [], [], []
    for chunk in states[:-1].split(at_once):
        scores = logits_of(chunk)
        if keep_logits:
            at_end.append(scores[:, :, 0].clone())
        argmax.append(scores.argmax(-1).masked_fill(~valid, IGNORE_INDEX))
        nll.append(nll_of(scores))
    shape = (len(paths), len(windows))
    token_argmax = torch.cat(argmax).unflatten(0, shape).movedim(2, 0)
    token_nll = torch.cat(nll).unflatten(0, shape).movedim(2, 0)
    return Knockout(
        paths=paths,
        windows=windows,
        answer_ids=answers,
        logits=torch.cat(at_end).unflatten(0, shape).movedim(2, 0) if keep_logits else None,
        token_argmax=token_argmax,
        token_nll=token_nll,
        nll=token_nll.nanmean(-1),
        agree=((token_argmax == answers[:, None, None]) | ~valid[:, None, None]).all(-1),
        full_logits=full[:, 0].clone(),
        full_token_argmax=full.argmax(-1).masked_fill(~valid, IGNORE_INDEX),
        full_token_nll=nll_of(full),
    )
