"""Every exit layer from one forward pass.

Exit k shares layers 0..k-1 with the full model and then runs on text only. The full model runs once (the main pass);
before layer i a branch for exit k = i leaves it, with the text states that the main pass has reached, and all branches
k <= i go through layer i together as one batch. With causal attention the text before the image is the same under
every exit, so a branch carries only the tokens after the first visual position and attends to the main pass's own keys
of the earlier text. Where that text does see the image (prefix-LM attention), branches carry all text.

With L layers, N tokens and M of them after the image, this costs L + (M / N) L (L - 1) / 2 layers instead of the
L (L + 1) / 2 and more of one run per exit. Questions on one image also share the main pass of everything up to the
image's last token.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dyvte.criteria import sequence_nll
from dyvte.errors import ModelError, UnsupportedError
from dyvte.instrument.attention import watch_attention
from dyvte.instrument.hooks import (
    LayerCall,
    Selection,
    drive_layers,
    is_driven,
    output_states,
    pack_mask,
    with_states,
)
from dyvte.instrument.states import TEXT_STATUS, status_weights, token_status
from dyvte.layout import TokenLayout
from dyvte.mllm import IGNORE_INDEX, MLLM, Batch

if TYPE_CHECKING:
    from dyvte.instrument.attention import AttentionCall

ENTROPIES = (
    "text_entropy",
    "text_entropy_normalised",
    "text_entropy_no_sink",
    "text_entropy_normalised_no_sink",
)

_NEVER = -1e30
"""Score of a pair that the mask forbids: its weight is 0, and weight times score still is."""

_LOGITS_AT_ONCE = 2**25
"""Logits computed at once when the answer is scored: 128 MiB in float32."""


@dataclass
class ExitSweep:
    """What the model does under every exit layer k = 0..L. B samples, L layers, A answer tokens, hidden size d.

    Attributes:
        logits: [B, L + 1, vocab] next-token logits at the prompt's end, float32.
        answer_ids: [B, A] the teacher-forced answer, -100 at padding. Without one, the full model's next token (A = 1).
        token_argmax: [B, L + 1, A] most likely token at every answer position; -100 at padding.
        token_agree: [B, L + 1, A] whether that is the answer's token; False at padding.
        token_nll: [B, L + 1, A] negative log-likelihood of the answer's token in nats; NaN at padding.
        agree: [B, L + 1] whether all answer tokens agree. If the answer is the full model's greedy one with its end
            token, exit k generates the same answer if and only if this holds (but for ties, see `up_to_ties`).
        nll: [B, L + 1] mean of `token_nll`: the cross-entropy of the answer.
        text_status: [B, L, P * d] status after every layer of the full model: the input of a gate there.
        text_entropy: [B, L + 1, L] entropy in nats of the attention of the question (instruction after the last image)
            restricted to text keys and renormalised, mean over queries and heads, in layer l under exit k; NaN for
            l < k, where exit k has not happened yet. Row L is the full model.
        text_entropy_normalised: the same, each query's divided by the log of the number of its text keys.
        text_entropy_no_sink: without the first token that is not padding.
        text_entropy_normalised_no_sink: both.
    """

    logits: Tensor
    answer_ids: Tensor
    token_argmax: Tensor
    token_agree: Tensor
    token_nll: Tensor
    agree: Tensor
    nll: Tensor
    text_status: Tensor
    text_entropy: Tensor
    text_entropy_normalised: Tensor
    text_entropy_no_sink: Tensor
    text_entropy_normalised_no_sink: Tensor

    @property
    def answer_valid(self) -> Tensor:
        """[B, A] False at padding of the answer."""
        return self.answer_ids != IGNORE_INDEX

    def up_to_ties(self) -> ExitSweep:
        """The same results with agreement up to ties, for answers that are the full model's own greedy ones.

        Generation and the sweep round differently: where two tokens tie up to rounding, the full model may prefer the
        other one here. Both are then its choice, and an exit that makes either of them agrees; so exit L always does.
        """
        own_choice = self.token_argmax == self.token_argmax[:, -1:]
        token_agree = (self.token_agree | own_choice) & self.answer_valid[:, None]
        return replace(self, token_agree=token_agree, agree=(token_agree | ~self.answer_valid[:, None]).all(-1))

    def to(self, device: torch.device | str) -> ExitSweep:
        """The same results on another device."""
        return ExitSweep(**{each.name: getattr(self, each.name).to(device) for each in fields(self)})


@torch.no_grad()
def exit_sweep(
    mllm: MLLM,
    batch: Batch,
    answer_ids: Tensor | None = None,
    *,
    shared_image: Sequence[int] | None = None,
    status_parts: Sequence[str] = TEXT_STATUS,
    entropy: bool = True,
    branch_tokens: int | None = None,
) -> ExitSweep:
    """Run every exit layer k = 0..L of a batch in one pass.

    The result is what L + 1 runs under `FixedExit(k)` give, up to float rounding.

    Args:
        mllm: the model.
        batch: prompts from `encode` or `batch`, padded on either side. Answers that it was encoded with are scored.
        answer_ids: [B, A] answers to score, teacher-forced after the prompts, -100 at padding (on the right). None:
            only the next token after the prompt is compared, with the full model's own choice.
        shared_image: [B] equal numbers for rows that show the same images after the same system text, whatever they
            ask: such rows share the main pass up to the image's last token. Ignored where attention lets the image see
            the question (prefix-LM).
        status_parts: what `text_status` is made of, see `dyvte.instrument.states.status_weights`.
        entropy: whether to compute the entropies (else NaN).
        branch_tokens: most tokens of branches that go through a layer at once: bounds memory, changes no result. By
            default as many as the main pass has.

    Raises:
        UnsupportedError: the layers cannot be driven, or a policy is active.
        ValueError: answers that do not fit the batch.
        ModelError: NaN among the logits.
    """
    if is_driven(mllm):
        raise UnsupportedError("exit_sweep runs every exit itself: call it outside of any `with policy(mllm):` block")
    # Here, not above: policies import instruments.
    from dyvte.policies.base import check_model

    check_model(mllm)
    inputs, answers = _teacher_forced(mllm, batch, answer_ids)
    if shared_image is not None:
        if len(shared_image) != len(batch["input_ids"]):
            raise ValueError(f"shared_image has {len(shared_image)} entries for {len(batch['input_ids'])} rows")
        inputs = inputs.right_padded()  # the same image must stand at the same positions
    sweep = _Sweep(mllm, inputs, answers, shared_image, status_parts, entropy, branch_tokens)
    return sweep.run()


def greedy_answer_ids(mllm: MLLM, batch: Batch, max_new_tokens: int = 64) -> Tensor:
    """The full model's greedy answers [B, A] as `MLLM.generate_ids` gives them, -100 at padding."""
    rows = mllm.generate_ids(batch, max_new_tokens=max_new_tokens)
    answers = torch.full((len(rows), max(map(len, rows))), IGNORE_INDEX, dtype=torch.long)
    for index, row in enumerate(rows):
        answers[index, : len(row)] = torch.tensor(row)
    return answers.to(mllm.device)


def _teacher_forced(mllm: MLLM, batch: Batch, answer_ids: Tensor | None) -> tuple[Batch, Tensor | None]:
    """The batch with the answers behind the prompts, and the answers [B, A]."""
    answer = batch.layout.answer
    if answer.any():
        if answer_ids is not None:
            raise ValueError("exit_sweep: the batch holds answers already; leave answer_ids out")
        counts = answer.sum(1).tolist()
        rows = torch.arange(len(counts), device=answer.device)
        chosen = Selection.of(answer, rows, counts)
        ids = batch["input_ids"].gather(1, chosen.index)
        answer_ids = ids if chosen.valid is None else ids.masked_fill(~chosen.valid, IGNORE_INDEX)
    if answer_ids is None:
        return batch, None
    if answer_ids.ndim != 2 or len(answer_ids) != len(batch["input_ids"]):
        raise ValueError(
            f"answer_ids must be [{len(batch['input_ids'])}, A] like the batch, got {tuple(answer_ids.shape)}"
        )
    answer_ids = answer_ids.to(mllm.device)
    real = answer_ids != IGNORE_INDEX
    if not real[:, :1].all():
        empty = (~real.any(1)).nonzero().flatten().tolist()
        raise ValueError(
            f"the answer of row {empty[0]} is empty" if empty else "answer_ids must be padded on the right"
        )
    if (real[:, 1:] & ~real[:, :-1]).any():
        raise ValueError("answer_ids must be padded on the right")
    # Nothing is predicted from the last token of an answer, so it does not have to run.
    if answer.any() or answer_ids.shape[1] == 1:
        return batch, answer_ids
    # Where it ends a shorter answer it runs along, and must not be taken for an image without pixels.
    last = real & ~torch.nn.functional.pad(real[:, 1:], (0, 1))
    visual = torch.isin(answer_ids, torch.tensor(mllm.visual_token_ids, device=answer_ids.device))
    return mllm.append_answers(batch, answer_ids.masked_fill(last & visual, 0)[:, :-1]), answer_ids


# ---------------------------------------------------------------------- pieces of a layer


@dataclass
class _Frame:
    """Some tokens of some rows that run through layers apart from the others.

    Attributes:
        own: the tokens that run.
        earlier: tokens of the same rows that they also attend to, whose keys and values come from another pass.
    """

    own: Selection
    earlier: Selection | None

    @property
    def rows(self) -> Tensor:
        """[b] rows of the batch."""
        return self.own.rows

    @cached_property
    def key_positions(self) -> Tensor:
        """[b, K] positions of the keys: the earlier ones, then its own."""
        return self.own.index if self.earlier is None else torch.cat([self.earlier.index, self.own.index], dim=1)

    @cached_property
    def key_valid(self) -> Tensor:
        """[b, K] False where a key is padding."""
        parts = [self.own] if self.earlier is None else [self.earlier, self.own]
        return torch.cat(
            [torch.ones_like(each.index, dtype=torch.bool) if each.valid is None else each.valid for each in parts], 1
        )

    def mask(self, call: LayerCall) -> Tensor | None:
        """The layer's attention mask for these queries and keys."""
        return self.own.remembered("frame mask", call.mask, lambda: self._mask(call))

    def _mask(self, call: LayerCall) -> Tensor | None:
        mask, valid = call.mask, self.key_valid
        if mask is None and call.uses_flash:
            return None if valid.all() else valid
        if mask is None:
            if self.earlier is None:
                return None  # causal, padding on the right
            causal = self.own.index[:, :, None] >= self.key_positions[:, None, :]
            return (causal & valid[:, None, :])[:, None]
        mask = mask.expand(call.hidden.shape[0], *mask.shape[1:])[self.rows]
        return pack_mask(mask, self.own.index, self.key_positions, None if valid.all() else valid)

    def allowed(self, call: LayerCall) -> Tensor:
        """[b, M, K] which keys each query may see."""
        mask = self.mask(call)
        if mask is None or mask.ndim == 2:
            causal = self.own.index[:, :, None] >= self.key_positions[:, None, :]
            return causal & self.key_valid[:, None, :]
        return mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] > torch.finfo(mask.dtype).min / 2


class _Keys:
    """Stands in for a KV cache in one call of one layer: adds the keys of earlier tokens, and keeps what it saw."""

    def __init__(
        self, earlier: tuple[Tensor, Tensor] | None = None, rows: Tensor | None = None, positions: Tensor | None = None
    ) -> None:
        self.earlier = earlier
        self.rows, self.positions = rows, positions  # [b] and [b, K]: which keys `update` returns, None for all
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.keys, self.values = keys, values
        if self.earlier is None:
            return keys, values
        return _behind(self.earlier[0], keys), _behind(self.earlier[1], values)

    def get_seq_length(self, *_: Any) -> int:
        return 0

    def of(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of `rows`: [b, heads, N, head size]."""
        if self.keys is None or self.values is None:
            raise UnsupportedError("a decoder layer did not show its keys: it does not write to a KV cache")
        if len(self.keys) == 1:
            return self.keys.expand(len(rows), -1, -1, -1), self.values.expand(len(rows), -1, -1, -1)
        return self.keys[rows], self.values[rows]

    def at(self, rows: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of positions [b, n] of `rows`: [b, heads, n, head size]."""
        keys, values = self.of(rows)
        return _take(keys, index), _take(values, index)


def _take(tensor: Tensor, index: Tensor) -> Tensor:
    """[b, heads, N, size] at positions [b, n]."""
    return tensor.gather(2, index[:, None, :, None].expand(-1, tensor.shape[1], -1, tensor.shape[3]))


def _behind(earlier: Tensor, own: Tensor) -> Tensor:
    """Earlier keys [b, heads, E, size] in front of each repetition of the batch in [n * b, heads, M, size]."""
    count = earlier.shape[2]
    joint = own.new_empty(*own.shape[:2], count + own.shape[2], own.shape[3])
    joint.unflatten(0, (-1, len(earlier)))[:, :, :, :count] = earlier
    joint[:, :, count:] = own
    return joint


def _repeated(tensor: Tensor, times: int, axis: int = 0) -> Tensor:
    """[..., b, ...] -> [..., times * b, ...], the whole batch repeated; no copy for a batch of one."""
    shape = list(tensor.shape)
    wide = tensor.unsqueeze(axis).expand(*shape[:axis], times, *shape[axis:])
    return wide.flatten(axis, axis + 1)


def _repeat_argument(name: str, packed: Any, times: int) -> Any:
    if isinstance(packed, (tuple, list)):
        return type(packed)(_repeat_argument(name, each, times) for each in packed)
    if not isinstance(packed, Tensor):
        return packed
    axis = {"position_ids": packed.ndim - 2, "position_embeddings": packed.ndim - 3}.get(name, 0)
    return _repeated(packed, times, axis)


def _locate(positions: Tensor, valid: Tensor, wanted: Tensor, length: int) -> Tensor:
    """Where the positions `wanted` [b, n] stand in `positions` [b, m]: [b, n]."""
    table = wanted.new_zeros(len(wanted), length + 1)
    order = torch.arange(positions.shape[1], device=positions.device).expand_as(positions)
    table.scatter_(1, torch.where(valid, positions, length), order)
    return table.gather(1, wanted)


@dataclass
class _EntropyPlan:
    """Which attention rows the entropies of some rows are taken from.

    Attributes:
        frame: the text of these rows; its keys are the text keys.
        queries: the question's tokens within `frame.own`.
        sink: [b, K] the sink among the keys.
    """

    frame: _Frame
    queries: Selection
    sink: Tensor

    @classmethod
    def of(cls, frame: _Frame, layout: TokenLayout) -> _EntropyPlan:
        own = frame.own
        asks = layout.text_status_positions[own.rows].gather(1, own.index)
        if own.valid is not None:
            asks = asks & own.valid
        queries = Selection.of(asks, torch.arange(len(asks), device=asks.device), asks.sum(1).tolist())
        sink = (frame.key_positions == layout.first_token[own.rows][:, None]) & frame.key_valid
        return cls(frame, queries, sink)

    @property
    def query_positions(self) -> Tensor:
        """[b, q] positions of the queries."""
        return self.frame.own.index.gather(1, self.queries.index)

    def entropies(self, call: LayerCall, query: Tensor, key: Tensor, scale: float, softcap: float | None) -> Tensor:
        """The four `ENTROPIES` [n, b, 4].

        Args:
            call: the layer's call.
            query: [n * b, H, q, size] of `queries`.
            key: [n * b, H_kv, K, size] of the frame's keys.
            scale: factor on the scores.
            softcap: scores s become softcap * tanh(s / softcap).
        """
        allowed = self.frame.own.remembered("allowed to the question", call.mask, lambda: self._allowed(call))
        rows, heads, count, size = query.shape
        grouped = (query.float() * scale).reshape(rows, key.shape[1], -1, size)
        scores = (grouped @ key.float().transpose(2, 3)).view(-1, len(allowed), heads, count, key.shape[2])
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        mask = self.frame.mask(call)
        if mask is not None and mask.is_floating_point():
            bias = mask[:, 0].gather(1, self.queries.index[:, :, None].expand(-1, -1, mask.shape[3]))
            scores = scores + torch.where(allowed, bias, 0.0)[:, None]
        return text_entropies(scores, allowed, self.sink, self.queries.valid)

    def _allowed(self, call: LayerCall) -> Tensor:
        allowed = self.frame.allowed(call)
        return allowed.gather(1, self.queries.index[:, :, None].expand(-1, -1, allowed.shape[2]))


def text_entropies(scores: Tensor, allowed: Tensor, sink: Tensor, valid: Tensor | None = None) -> Tensor:
    """Entropies of attention over text keys, mean over queries and heads, in nats.

    With e the exponentials of the scores s, T the sum of e and W that of e * s over some keys, the entropy of the
    attention on these keys is log T - W / T.

    Args:
        scores: [n, b, H, q, K] attention scores of the queries for text keys, before masking.
        allowed: [b, q, K] which keys a query may see.
        sink: [b, K] which key is the attention sink.
        valid: [b, q] False where a query is padding.

    Returns:
        [n, b, 4] in the order of `ENTROPIES`. Queries without an allowed key are left out; those with one only are
        left out of the normalised entropies, whose divisor is the log of the number of keys.
    """
    scores = scores.masked_fill(~allowed[:, None], _NEVER)
    scores = scores - scores.amax(-1, keepdim=True)
    weight = scores.exp()
    columns = torch.stack([torch.ones_like(sink), ~sink], dim=-1).to(scores.dtype)  # [b, K, 2]
    total = (weight @ columns[:, None]).clamp_min(torch.finfo(scores.dtype).tiny)
    entropy = (total.log() - (weight * scores) @ columns[:, None] / total).clamp_min(0.0)  # [n, b, H, q, 2]
    counts = allowed.to(columns.dtype) @ columns  # [b, q, 2]
    asked = torch.ones_like(counts[..., :1]) if valid is None else valid[..., None].to(counts.dtype)
    results = []
    for divisor, counted in ((torch.ones_like(counts), counts > 0), (counts.clamp_min(2).log(), counts > 1)):
        weights = asked * counted / divisor
        number = (asked * counted).sum(1) * scores.shape[2]
        results.append((entropy * weights[:, None]).sum((2, 3)) / number)
    plain, normalised = results
    return torch.stack([plain[..., 0], normalised[..., 0], plain[..., 1], normalised[..., 1]], dim=-1)


# ---------------------------------------------------------------------------- the sweep


class _SharedPrefix:
    """Everything up to the last visual token, run once for all rows that show the same image.

    Attributes:
        selection: the prefix of one representative row a group.
        group: [B] group of every row (0 where a row shows no image and has no prefix); `groups` as a list.
        lengths: length of every row's prefix, which stands at its start.
        suffix: frame of the tokens behind the prefix, of all rows.
    """

    def __init__(self, layout: TokenLayout, input_ids: Tensor, shared_image: Sequence[int]) -> None:
        position = torch.arange(input_ids.shape[1], device=input_ids.device)
        length = torch.where(layout.visual, position, -1).amax(1) + 1
        prefix = position < length[:, None]
        representative: dict[int, int] = {}
        self.lengths: list[int] = length.tolist()
        self.groups: list[int] = []
        for row, image in enumerate(shared_image):
            if self.lengths[row] == 0:
                self.groups.append(0)
                continue
            first = representative.setdefault(image, row)
            if not torch.equal(input_ids[row, : self.lengths[row]], input_ids[first, : self.lengths[first]]):
                raise ValueError(
                    f"rows {first} and {row} are said to share an image, but their prompts differ before its last token"
                )
            self.groups.append(list(representative).index(image))
        device = input_ids.device
        rows = torch.arange(len(self.groups), device=device)
        chosen = torch.tensor(list(representative.values()), device=device)
        self.selection = Selection.of(prefix, chosen, [self.lengths[row] for row in representative.values()])
        self.group = torch.tensor(self.groups, device=device)
        of_group = prefix[chosen][self.group] & (length > 0)[:, None]
        rest = ~layout.padding & ~prefix
        self.suffix = _Frame(
            Selection.of(rest, rows, rest.sum(1).tolist()),
            Selection.of(of_group, rows, self.lengths),
        )
        self.mask = prefix

    def check(self, hidden: Tensor) -> None:
        """Refuse rows whose visual tokens are not those of their representative."""
        index, mine = self.suffix.earlier, hidden
        assert index is not None
        theirs = hidden[self.selection.rows[self.group][:, None], index.index]
        difference = (index.pack(mine) - theirs).abs().amax(-1)
        if index.valid is not None:
            difference = difference * index.valid
        if (difference > 1e-3 * theirs.abs().amax()).any():
            row = int(difference.amax(1).argmax())
            first = int(self.selection.rows[self.group[row]])
            raise ValueError(f"rows {first} and {row} are said to share an image, but their visual tokens differ")


class _Sweep:
    """One call of `exit_sweep`."""

    def __init__(
        self,
        mllm: MLLM,
        inputs: Batch,
        answers: Tensor | None,
        shared_image: Sequence[int] | None,
        status_parts: Sequence[str],
        entropy: bool,
        branch_tokens: int | None,
    ) -> None:
        self.mllm, self.inputs, self.answers = mllm, inputs, answers
        self.layout = inputs.layout
        self.batch_size, self.length = self.layout.roles.shape
        self.branch_tokens = branch_tokens or self.batch_size * self.length
        self.wants_entropy = entropy
        self.status_weights = status_weights(self.layout, status_parts)
        self.status: list[Tensor] = []
        num_layers = mllm.num_layers
        self.entropies = torch.full(
            (num_layers + 1, num_layers, self.batch_size, len(ENTROPIES)), torch.nan, device=mllm.device
        )
        self.shared = None
        if shared_image is not None and self.layout.visual.any():
            self.shared = _SharedPrefix(self.layout, inputs["input_ids"], shared_image)
        self.seeing = self.layout.has_image.nonzero().flatten()  # rows that branch
        self.branches: Tensor | None = None  # [L, b, M, d]
        self.final: Tensor | None = None  # [B, N, d] after the last layer
        self.template: Any = None
        self._look: Callable[[AttentionCall], None] | None = None

    def run(self) -> ExitSweep:
        model = self.mllm.model
        inputs = {name: value for name, value in self.inputs.items() if name not in ("labels", "past_key_values")}
        if "logits_to_keep" in inspect.signature(model.forward).parameters:
            inputs["logits_to_keep"] = 1
        watching = watch_attention(self.mllm, self._see) if self.wants_entropy else nullcontext()
        with drive_layers(self.mllm, self._run_layer), watching:
            model(**{**inputs, "use_cache": False})
        if self.final is None:
            raise UnsupportedError(f"{type(model).__name__} did not run its decoder layers in order")
        return self._score()

    def _see(self, layer: int, call: AttentionCall) -> None:
        if self._look is not None:
            self._look(call)

    # ------------------------------------------------------------------------ a layer

    def _run_layer(self, call: LayerCall) -> Any:
        if call.index == 0:
            self._plan(call)
        if self.branches is not None:
            self.branches[call.index] = self.branch.own.pack(call.hidden)
        output, early = self._main_pass(call)
        self.template = output
        hidden = output_states(output)
        self.status.append(token_status(hidden, self.status_weights))
        if self.branches is not None:
            self._run_branches(call, self.branches, early)
        if call.index == self.mllm.num_layers - 1:
            self.final = hidden
        return output

    def _plan(self, call: LayerCall) -> None:
        """Decide, from the first layer's mask, what branches carry and whether prefixes can be shared."""
        layout, mask = self.layout, call.mask
        early = layout.system
        if _sees_ahead(mask, early, ~early & ~layout.padding):
            early = torch.zeros_like(early)
        if self.shared is not None:
            self.shared.check(call.hidden)
            if _sees_ahead(mask, self.shared.mask, ~self.shared.mask & ~layout.padding):
                self.shared = None
        everyone = torch.arange(self.batch_size, device=call.hidden.device)
        position = torch.arange(self.length, device=call.hidden.device)
        self.everything = _Frame(Selection(everyone, position.expand(self.batch_size, -1), None), None)
        self.entropy_plan = _EntropyPlan.of(self._text_frame(early, everyone), layout) if self.wants_entropy else None
        if len(self.seeing):
            self.branch = self._text_frame(early, self.seeing)
            self.branch_entropy_plan = _EntropyPlan.of(self.branch, layout) if self.wants_entropy else None
            self.branches = call.hidden.new_empty(
                self.mllm.num_layers, *self.branch.own.index.shape, call.hidden.shape[2]
            )

    def _text_frame(self, early: Tensor, rows: Tensor) -> _Frame:
        late = self.layout.text & ~early
        counts = early[rows].sum(1).tolist()
        return _Frame(
            Selection.of(late, rows, late[rows].sum(1).tolist()),
            Selection.of(early, rows, counts) if any(counts) else None,
        )

    def _main_pass(self, call: LayerCall) -> tuple[Any, tuple[Tensor, Tensor] | None]:
        """The layer of the full model; also keys and values of the branches' earlier text."""
        if self.shared is not None:
            return self._shared_main_pass(call, self.shared)
        keys = _Keys()
        self._expect(call, self.everything, self.entropy_plan, self.mllm.num_layers)
        output = call.run(past_key_values=keys)
        if self.branches is None or self.branch.earlier is None:
            return output, None
        return output, keys.at(self.branch.rows, self.branch.earlier.index)

    def _shared_main_pass(self, call: LayerCall, shared: _SharedPrefix) -> tuple[Any, tuple[Tensor, Tensor] | None]:
        hidden = call.hidden.clone() if call.index == 0 else call.hidden
        keys = _Keys()
        output = call.run(shared.selection.pack(hidden), **{**call.packed(shared.selection), "past_key_values": keys})
        # Branches and the status read the prefix of every row.
        for row, (group, length) in enumerate(zip(shared.groups, shared.lengths, strict=True)):
            hidden[row, :length] = output_states(output)[group, :length]
        suffix = shared.suffix
        self._expect(call, suffix, self.entropy_plan, self.mllm.num_layers)
        suffix.own.put_back(
            hidden, self._run_frame(call, suffix, suffix.own.pack(call.hidden), keys.of(shared.group), 1)
        )
        early = None
        if self.branches is not None and self.branch.earlier is not None:
            early = keys.at(shared.group[self.branch.rows], self.branch.earlier.index)
        return with_states(output, hidden), early

    def _run_branches(self, call: LayerCall, branches: Tensor, early: tuple[Tensor, Tensor] | None) -> None:
        _, rows, tokens, size = branches.shape
        at_once = max(1, self.branch_tokens // (rows * tokens))
        for first in range(0, call.index + 1, at_once):
            exits = branches[first : min(first + at_once, call.index + 1)]
            self._expect(call, self.branch, self.branch_entropy_plan, slice(first, first + len(exits)))
            states = self._run_frame(call, self.branch, exits.reshape(-1, tokens, size), early, len(exits))
            exits.copy_(states.view_as(exits))

    def _run_frame(
        self, call: LayerCall, frame: _Frame, states: Tensor, earlier: tuple[Tensor, Tensor] | None, times: int
    ) -> Tensor:
        """Run the layer on the frame's tokens `times` over, in different states [times * b, M, d]."""
        packed = call.packed(frame.own)
        packed["attention_mask"] = frame.mask(call)
        if times > 1:
            packed = {
                name: value if value is call.arguments.get(name) else _repeat_argument(name, value, times)
                for name, value in packed.items()
            }
        keys = _Keys(earlier, frame.rows.repeat(times), frame.key_positions.repeat(times, 1))
        return output_states(call.run(states, **{**packed, "past_key_values": keys}))

    # ---------------------------------------------------------------------- entropies

    def _expect(self, call: LayerCall, frame: _Frame, plan: _EntropyPlan | None, exits: int | slice) -> None:
        """Take the entropies of exits `exits` from the next attention call, in which the tokens of `frame` run."""
        if plan is None:
            return
        queries, keys = frame.own.remembered("places", plan, lambda: self._places(frame, plan))

        def look(seen: AttentionCall) -> None:
            self._look = None
            query = _take(seen.query, _repeated(queries, len(seen.query) // len(queries)))
            key = seen.key if keys is None else _take(seen.key, keys)
            entropies = plan.entropies(call, query, key, seen.scale, seen.softcap)
            if isinstance(exits, int):
                self.entropies[exits, call.index] = entropies[0]
            else:
                self.entropies[exits, call.index, plan.frame.rows] = entropies

        self._look = look

    def _places(self, frame: _Frame, plan: _EntropyPlan) -> tuple[Tensor, Tensor | None]:
        """Where the plan's queries and keys stand among those of `frame`; None for keys in the same order."""
        if frame is plan.frame:
            return plan.queries.index, None
        queries = _locate(frame.own.index, _or_all(frame.own.valid, frame.own.index), plan.query_positions, self.length)
        return queries, _locate(frame.key_positions, frame.key_valid, plan.frame.key_positions, self.length)

    # ------------------------------------------------------------------------- scoring

    def _score(self) -> ExitSweep:
        assert self.final is not None
        num_exits = self.mllm.num_layers + 1
        width = 1 if self.answers is None else self.answers.shape[1]
        # Answer token j is predicted from the j-th position after the prompt's end.
        position = (self.layout.last_prompt[:, None] + torch.arange(width, device=self.final.device)).clamp(
            max=self.length - 1
        )
        everyone = torch.arange(self.batch_size, device=self.final.device)
        states = self.final[everyone[:, None], position].expand(num_exits, -1, -1, -1).clone()
        if self.branches is not None:
            own = self.branch.own
            local = _locate(own.index, _or_all(own.valid, own.index), position[own.rows], self.length)
            states[:-1, own.rows] = self.branches.gather(
                2, local[None, :, :, None].expand(num_exits - 1, -1, -1, states.shape[-1])
            )
        self.branches = self.final = None

        logits, argmax, nll = [], [], []
        vocabulary = self.mllm.lm_head.weight.shape[0]
        at_once = max(1, _LOGITS_AT_ONCE // (self.batch_size * width * vocabulary))
        for first in range(0, num_exits, at_once):
            chunk = states[first : first + at_once]
            scores = self._logits(chunk.flatten(0, 1)).float().unflatten(0, chunk.shape[:2])
            self._check_finite(scores, first)
            logits.append(scores[:, :, 0].clone())
            if self.answers is not None:
                argmax.append(scores.argmax(-1))
                token = self.answers.clamp(min=0).expand(len(chunk), -1, -1)[..., None]
                nll.append(scores.logsumexp(-1) - scores.gather(-1, token)[..., 0])
        at_end = torch.cat(logits).transpose(0, 1)
        answers = self.answers
        if answers is None:
            token_argmax = at_end.argmax(-1, keepdim=True)
            answers = token_argmax[:, -1]
            token_nll = at_end.logsumexp(-1, keepdim=True) - at_end.gather(-1, answers[:, None].expand_as(token_argmax))
        else:
            token_argmax, token_nll = torch.cat(argmax).transpose(0, 1), torch.cat(nll).transpose(0, 1)
        valid = answers != IGNORE_INDEX
        token_agree = (token_argmax == answers[:, None]) & valid[:, None]
        token_argmax = token_argmax.masked_fill(~valid[:, None], IGNORE_INDEX)
        token_nll = token_nll.masked_fill(~valid[:, None], torch.nan)
        entropies = self._all_entropies().permute(3, 2, 0, 1)
        return ExitSweep(
            logits=at_end,
            answer_ids=answers,
            token_argmax=token_argmax,
            token_agree=token_agree,
            token_nll=token_nll,
            agree=(token_agree | ~valid[:, None]).all(-1),
            nll=sequence_nll(token_nll, valid),
            text_status=torch.stack(self.status, dim=1),
            **dict(zip(ENTROPIES, entropies, strict=True)),
        )

    def _all_entropies(self) -> Tensor:
        """[L + 1, L, B, 4]; rows without an image are the same under every exit."""
        blind = (~self.layout.has_image).nonzero().flatten()
        if len(blind) and self.wants_entropy:
            exits = torch.arange(self.mllm.num_layers + 1, device=blind.device)[:, None]
            happened = (torch.arange(self.mllm.num_layers, device=blind.device) >= exits)[:, :, None, None]
            happened[-1] = True
            full = self.entropies[-1:, :, blind]
            self.entropies[:, :, blind] = torch.where(happened, full, torch.nan)
        return self.entropies

    def _logits(self, states: Tensor) -> Tensor:
        """Logits [r, T, vocab] of final states [r, T, d]: the model's own norm, head and scaling.

        They come from running the model on one text token with its layers bypassed.
        """

        def bypass(call: LayerCall) -> Any:
            last = call.index == self.mllm.num_layers - 1
            return with_states(self.template, states if last else call.hidden)

        token = self.inputs["input_ids"][:1].gather(1, self.layout.last_prompt[:1, None])
        with drive_layers(self.mllm, bypass):
            return self.mllm.model(input_ids=token, attention_mask=torch.ones_like(token), use_cache=False).logits

    def _check_finite(self, logits: Tensor, first_exit: int) -> None:
        broken = logits.isnan().any(-1).any(-1).nonzero()
        if len(broken):
            exit_layer, row = broken[0].tolist()
            raise ModelError(f"NaN among the logits of row {row} under exit {first_exit + exit_layer}")


def _or_all(valid: Tensor | None, like: Tensor) -> Tensor:
    return torch.ones_like(like, dtype=torch.bool) if valid is None else valid


def _sees_ahead(mask: Tensor | None, queries: Tensor, keys: Tensor) -> bool:
    """Whether the mask lets any of the positions `queries` [B, N] see any of `keys` [B, N]: never if causal."""
    if mask is None or mask.ndim != 4:
        return False
    allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return bool((allowed[:, 0] & queries[:, :, None] & keys[:, None, :]).any())
