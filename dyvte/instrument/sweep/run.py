"""Every exit layer from one forward pass.

Exit k shares layers 0..k-1 with the full model and then runs on text only. The full model runs once (the main pass);
before layer i a branch for exit k = i leaves it, with the text states that the main pass has reached, and all branches
k <= i go through layer i together as one batch. With causal attention the text before the image is the same under
every exit, so a branch carries only the tokens after the first visual position and attends to the main pass's own keys
of the earlier text. Where that text does see the image (prefix-LM attention), branches carry all text.

With L layers, N tokens, M of them after the image, this costs L + (M / N) L (L - 1) / 2 layers, one run per exit more
than L (L + 1) / 2. Questions on one image also share the main pass up to the image's last token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from dyvte.batch import IGNORE_INDEX, Batch
from dyvte.errors import ModelError, UnsupportedError
from dyvte.instrument.attention_calls import AttentionCall, watch_attention
from dyvte.instrument.causal.readout import read_out
from dyvte.instrument.hooks import (
    LayerCall,
    Selection,
    check_model,
    drive_layers,
    is_driven,
    output_states,
    with_states,
)
from dyvte.instrument.kept_keys import locate, take
from dyvte.instrument.keys.indexed import starts_of
from dyvte.instrument.keys.places import running_at
from dyvte.instrument.keys.shared import BranchSharing, borrows_keys
from dyvte.instrument.states import TEXT_STATUS, status_weights, token_status
from dyvte.instrument.sweep.answers import teacher_forced
from dyvte.instrument.sweep.criteria import sequence_nll
from dyvte.instrument.sweep.entropy import ENTROPIES, EntropyPlan, chosen_keys
from dyvte.instrument.sweep.frames import Frame, Keys, SharedPrefix, or_all, repeat_arguments, repeated, sees_ahead
from dyvte.instrument.sweep.without_attention import behind_padding, run_behind_padding
from dyvte.mllm import MLLM
from dyvte.model_parts import indexer_of, needs_all_tokens, runs_together

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
        exit_status: [B, E, L, 2d] the paper's text status after every layer under each exit asked for.
        text_entropy: [B, L + 1, L] entropy in nats of the attention of the question (instruction after the last image)
            restricted to text keys and renormalised, mean over queries and heads, in layer l under exit k; NaN for
            l < k, where exit k has not happened yet. Row L is the full model.
        text_entropy_normalised: the same, each query's divided by the log of the number of its text keys. `..._no_sink`
            is either without the first token that is not padding.

    Example:
        >>> dyvte.exit_sweep(mllm, batch).agree.int().argmax(1).shape  # [B] first exit that keeps the next token
        torch.Size([2])
    """

    logits: Tensor
    answer_ids: Tensor
    token_argmax: Tensor
    token_agree: Tensor
    token_nll: Tensor
    agree: Tensor
    nll: Tensor
    text_status: Tensor
    exit_status: Tensor
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
    status_of_exits: Sequence[int] = (),
    entropy: bool = True,
    branch_tokens: int | None = None,
) -> ExitSweep:
    """Run every exit layer k = 0..L of a batch in one pass.

    The result is what L + 1 runs under `FixedExit(k)` give, up to float rounding.

    Args:
        mllm: the model.
        batch: prompts from `encode` or `batch`, padded on either side. Answers that it was encoded with are scored.
        answer_ids: [B, A] answers to score after the prompts, -100 at padding (on the right). None: the full model's
            next token.
        shared_image: [B] equal numbers for rows that show the same images after the same system text, whatever they
            ask: such rows share the main pass up to the image's last token. Ignored where attention lets the image see
            the question (prefix-LM).
        status_parts: what `text_status` is made of, see `dyvte.instrument.states.status_weights`.
        status_of_exits: E exit layers k in 0..L whose text status is kept in `exit_status`.
        entropy: whether to compute the entropies (else NaN).
        branch_tokens: most tokens of branches in a layer at once (bounds memory); by default the main pass's number.

    Raises:
        UnsupportedError: the layers cannot be driven, or a policy is active.
        ValueError: answers that do not fit the batch, or no such exit.
        ModelError: NaN among the logits.

    Example:
        >>> dyvte.exit_sweep(mllm, batch).agree[:, -1].tolist()  # the last exit is the full model
        [True, True]
    """
    if is_driven(mllm):
        raise UnsupportedError("exit_sweep runs every exit itself: call it outside of any `with policy(mllm):` block")
    check_model(mllm)
    inputs, answers = teacher_forced(mllm, batch, answer_ids)
    if shared_image is not None:
        if len(shared_image) != len(batch["input_ids"]):
            raise ValueError(f"shared_image has {len(shared_image)} entries for {len(batch['input_ids'])} rows")
        inputs = inputs.right_padded()  # the same image must stand at the same positions
    elif starts_of(mllm, inputs.get("attention_mask")) is not None:
        inputs = inputs.right_padded()
    if wrong := [k for k in status_of_exits if not 0 <= k <= mllm.num_layers]:
        raise ValueError(f"status_of_exits holds {wrong[0]}; give exit layers in 0..{mllm.num_layers}")
    sweep = _Sweep(mllm, inputs, answers, shared_image, status_parts, status_of_exits, entropy, branch_tokens)
    return sweep.run()


class _Sweep:
    """One call of `exit_sweep`."""

    def __init__(
        self,
        mllm: MLLM,
        inputs: Batch,
        answers: Tensor | None,
        shared_image: Sequence[int] | None,
        status_parts: Sequence[str],
        status_of_exits: Sequence[int],
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
        self.status_of_exits = list(status_of_exits)
        self.text_weights = status_weights(self.layout) if self.status_of_exits else None
        self.exit_status: list[Tensor] = []  # [B, E, 2d] after every layer
        self.no_status = torch.zeros(self.batch_size, 0, 2 * mllm.hidden_size, device=mllm.device)
        num_layers = mllm.num_layers
        self.entropies = torch.full(
            (num_layers + 1, num_layers, self.batch_size, len(ENTROPIES)), torch.nan, device=mllm.device
        )
        self.shared = None
        self.hybrid = any(map(needs_all_tokens, mllm.attentions))  # some build on all that a branch sees
        apart = self.hybrid or any(map(borrows_keys, mllm.attentions))  # rows that share a prefix would need own stores
        if shared_image is not None and self.layout.visual.any() and not apart:
            self.shared = SharedPrefix(self.layout, inputs["input_ids"], shared_image)
        self.seeing = self.layout.has_image.nonzero().flatten()  # rows that branch
        self.branches: Tensor | None = None  # [L, b, M, d]
        self.sharing = BranchSharing()
        self.final: Tensor | None = None  # [B, N, d] after the last layer
        self.template: Any = None
        self._look: Callable[[AttentionCall], None] | None = None

    def run(self) -> ExitSweep:
        model = self.mllm.model
        watching = watch_attention(self.mllm, self._see) if self.wants_entropy else nullcontext()
        with drive_layers(self.mllm, self._run_layer), watching:
            model(**self.inputs.without_cache(model))
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
        self.status.append(token_status(hidden[..., : self.mllm.hidden_size], self.status_weights))
        if self.branches is not None:
            self._run_branches(call, self.branches, early)
        if self.text_weights is not None:
            self.exit_status.append(self._exit_status(hidden, call.index, self.text_weights))
        if call.index == self.mllm.num_layers - 1:
            self.final = hidden
        return output

    def _plan(self, call: LayerCall) -> None:
        """Decide, from the first layer's mask, what branches carry and whether prefixes can be shared."""
        layout, mask = self.layout, call.mask
        early = layout.system
        if self.hybrid or sees_ahead(mask, early, ~early & ~layout.padding):
            early = torch.zeros_like(early)
        if self.shared is not None and not self.shared.is_possible(call, layout):
            self.shared = None
        everyone = torch.arange(self.batch_size, device=call.hidden.device)
        position = torch.arange(self.length, device=call.hidden.device)
        self.everything = Frame(Selection(everyone, position.expand(self.batch_size, -1), None), None)
        self.entropy_plan = EntropyPlan.of(self._text_frame(early, everyone), layout) if self.wants_entropy else None
        if len(self.seeing):
            self.branch = self._text_frame(early, self.seeing)
            self.branch_entropy_plan = EntropyPlan.of(self.branch, layout) if self.wants_entropy else None
            self.branches = call.hidden.new_empty(
                self.mllm.num_layers, *self.branch.own.index.shape, call.hidden.shape[2]
            )

    def _text_frame(self, early: Tensor, rows: Tensor) -> Frame:
        late = self.layout.text & ~early
        counts = early[rows].sum(1).tolist()
        return Frame(
            Selection.of(late, rows, late[rows].sum(1).tolist()),
            Selection.of(early, rows, counts) if any(counts) else None,
        )

    def _main_pass(self, call: LayerCall) -> tuple[Any, tuple[Tensor, ...] | None]:
        """The layer of the full model; also keys and values of the branches' earlier text."""
        if self.shared is not None:
            return self._shared_main_pass(call, self.shared)
        self._expect(call, self.everything, self.entropy_plan, self.mllm.num_layers)
        if runs_together(self.mllm.attentions[call.index]):
            return call.run(past_key_values=None), None
        keys = Keys()
        output = call.run(past_key_values=keys)
        if self.branches is None or self.branch.earlier is None or borrows_keys(self.mllm.attentions[call.index]):
            return output, None
        return output, keys.at(self.branch.rows, self.branch.earlier.index)

    def _shared_main_pass(self, call: LayerCall, shared: SharedPrefix) -> tuple[Any, tuple[Tensor, ...] | None]:
        hidden = call.hidden.clone() if call.index == 0 else call.hidden
        keys = Keys()
        output = shared.run(call, hidden, keys)  # branches and the status read the prefix of every row
        suffix = shared.suffix
        self._expect(call, suffix, self.entropy_plan, self.mllm.num_layers)
        suffix.own.put_back(hidden, self._run_frame(call, suffix, suffix.own.pack(call.hidden), keys.of(shared.group)))
        early = None
        if self.branches is not None and self.branch.earlier is not None:
            early = keys.at(shared.group[self.branch.rows], self.branch.earlier.index)
        return with_states(output, hidden), early

    def _run_branches(self, call: LayerCall, branches: Tensor, early: tuple[Tensor, ...] | None) -> None:
        _, rows, tokens, size = branches.shape
        at_once = max(1, self.branch_tokens // (rows * tokens))
        for first in range(0, call.index + 1, at_once):
            exits = branches[first : min(first + at_once, call.index + 1)]
            running = range(first, first + len(exits))
            together = runs_together(self.mllm.attentions[call.index])
            frame = Frame(behind_padding(self.branch.own)[0], None) if together else self.branch
            self._expect(call, frame, self.branch_entropy_plan, slice(running.start, running.stop))
            states = self._run_frame(call, self.branch, exits.reshape(-1, tokens, size), early, running)
            exits.copy_(states.view_as(exits))

    def _exit_status(self, hidden: Tensor, layer: int, weights: Tensor) -> Tensor:
        """[B, E, 2d] text status after a layer under the exits asked for: the full model's where none has happened."""
        size = self.mllm.hidden_size  # of a layer with several streams the first
        found = token_status(hidden[..., :size], weights)[:, None].repeat(1, len(self.status_of_exits), 1)
        happened = [place for place, k in enumerate(self.status_of_exits) if k <= layer]
        if self.branches is not None and happened:
            own = self.branch.own
            packed = own.pack(weights.transpose(1, 2)).transpose(1, 2)  # [b, 2, M]
            if own.valid is not None:
                packed = packed * own.valid[:, None]
            for place in happened:
                states = self.branches[self.status_of_exits[place]][..., :size]
                found[self.seeing, place] = token_status(states, packed)
        return found

    def _run_frame(
        self,
        call: LayerCall,
        frame: Frame,
        states: Tensor,
        earlier: tuple[Tensor, ...] | None,
        exits: range | None = None,
    ) -> Tensor:
        """Run the layer on the frame's tokens, under several exits in different states [exits * b, M, d]."""
        attention = self.mllm.attentions[call.index]
        if runs_together(attention):
            return run_behind_padding(call, frame.own, states)
        times = 1 if exits is None else len(exits)
        packed = repeat_arguments(call, {**call.packed(frame.own), "attention_mask": frame.mask(call)}, times)
        if exits is not None:
            packed |= self.sharing.on(call, frame.own, frame.key_positions, exits)
        positions, valid = frame.key_positions.repeat(times, 1), frame.key_valid.repeat(times, 1)
        packed["past_key_values"] = Keys(earlier, frame.rows.repeat(times), positions)
        with running_at(attention, frame.own.index.repeat(times, 1), positions, valid, self.length):
            return output_states(call.run(states, **packed))

    # ---------------------------------------------------------------------- entropies

    def _expect(self, call: LayerCall, frame: Frame, plan: EntropyPlan | None, exits: int | slice) -> None:
        """Take the entropies of exits `exits` from the next attention call, in which the tokens of `frame` run."""
        if plan is None or self.mllm.attentions[call.index] is None:
            return
        queries, keys = frame.own.remembered("places", plan, lambda: self._places(frame, plan))

        def look(seen: AttentionCall) -> None:
            self._look = None
            at = repeated(queries, len(seen.query) // len(queries))
            key, chosen = seen.key if keys is None else take(seen.key, keys), None
            if indexer_of(self.mllm.attentions[call.index]) is not None:
                chosen = chosen_keys(seen.mask, at, keys)
            entropies = plan.entropies(call, take(seen.query, at), key, seen.scale, seen.softcap, chosen)
            if isinstance(exits, int):
                self.entropies[exits, call.index] = entropies[0]
            else:
                self.entropies[exits, call.index, plan.frame.rows] = entropies

        self._look = look

    def _places(self, frame: Frame, plan: EntropyPlan) -> tuple[Tensor, Tensor | None]:
        """Where the plan's queries and keys stand among those of `frame`; None for keys in the same order."""
        if frame is plan.frame:
            return plan.queries.index, None
        queries = locate(frame.own.index, or_all(frame.own.valid, frame.own.index), plan.query_positions, self.length)
        return queries, locate(frame.key_positions, frame.key_valid, plan.frame.key_positions, self.length)

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
            local = locate(own.index, or_all(own.valid, own.index), position[own.rows], self.length)
            states[:-1, own.rows] = self.branches.gather(
                2, local[None, :, :, None].expand(num_exits - 1, -1, -1, states.shape[-1])
            )
        self.branches = self.final = None
        self.sharing = BranchSharing()

        logits, argmax, nll = [], [], []
        vocabulary = self.mllm.lm_head.weight.shape[0]
        at_once = max(1, _LOGITS_AT_ONCE // (self.batch_size * width * vocabulary))
        for first in range(0, num_exits, at_once):
            chunk = states[first : first + at_once]
            scores = read_out(self.mllm, self.inputs, chunk.flatten(0, 1), self.template).unflatten(0, chunk.shape[:2])
            if len(broken := scores.isnan().any(-1).any(-1).nonzero()):
                exit_layer, row = broken[0].tolist()
                raise ModelError(f"NaN among the logits of row {row} under exit {first + exit_layer}")
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
            exit_status=torch.stack(self.exit_status or [self.no_status] * self.mllm.num_layers, dim=2),
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
