"""Many interventions from one forward pass.

A branch is the model under one schedule: which intervention acts in which layer. Two branches are one as long as their
schedules agree, so branches form a tree whose trunk is the model left alone (the main pass); a layer runs once for each
node. Only positions from the first changed query on differ from the trunk: a node carries those, and attends to the
trunk's keys of the positions before them.

With L layers, a window [s, e) costs L - s layers on M of N positions. All L (L + 1) / 2 windows of an inverted path
share what they have in common: about L^3 / 6 node-layers instead of L^3 / 2.

Between two layers the state of every node is held. Where these would take more memory than the layers themselves, the
branches are divided among several passes. Those that act first come first: a later pass repeats the trunk only from the
first layer in which one of its branches acts.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dyvte.batch import Batch
from dyvte.errors import UnsupportedError
from dyvte.instrument.causal.groups import Intervention
from dyvte.instrument.causal.strands import NOTHING, TRUNK, Budget, Strand
from dyvte.instrument.hooks import LayerCall, drive_layers, output_states, with_states
from dyvte.instrument.kept_keys import locate, take
from dyvte.instrument.keys.places import counting_from
from dyvte.instrument.keys.shared import borrows_keys, lends_keys
from dyvte.instrument.sweep.frames import Frame, Keys, SharedPrefix, sees_ahead
from dyvte.mllm import MLLM
from dyvte.model_parts import indexer_of

STATES_A_TOKEN = 6
"""Held states of branches for each token that runs at once: about half of what a layer makes of one token (normed
states, queries, keys, values, what attention and MLP give, each as wide as a state or up to three times as wide)."""


class Branches:
    """Forward passes of a batch with branches riding along: one, or as many as memory asks for.

    Args:
        mllm: the model.
        inputs: the batch, answers behind the prompts.
        actions: the interventions that schedules refer to.
        schedules: for each branch the intervention that acts in each layer, or `NOTHING`; a branch keeps to one
            intervention.
        wanted: [B, n] positions whose final states are asked for, none of them before the last one of the prompt.
        shared_image: [B] equal numbers for rows that share all passes up to their image's last token.
        tokens_at_once: bounds memory: tokens that run through a layer at once; `STATES_A_TOKEN` times as many are held
            between layers, if one branch does not need more.
    """

    def __init__(
        self,
        mllm: MLLM,
        inputs: Batch,
        actions: Sequence[Intervention],
        schedules: Sequence[Sequence[int]],
        wanted: Tensor,
        shared_image: Sequence[int] | None,
        tokens_at_once: int | None,
    ) -> None:
        self.mllm, self.inputs, self.actions, self.schedules = mllm, inputs, actions, schedules
        self.layout, self.wanted = inputs.layout, wanted
        self.batch_size, self.length = self.layout.roles.shape
        self.tokens_at_once = tokens_at_once or self.batch_size * self.length
        self.shared = None
        # A state, or keys that are borrowed or chosen, would have to be handed on from what rows share to each of them.
        apart = any(each is None or borrows_keys(each) or indexer_of(each) for each in mllm.attentions)
        if shared_image is not None and self.layout.visual.any() and not apart:
            self.shared = SharedPrefix(self.layout, inputs["input_ids"], shared_image)
        self.acts_from = [_first_action(schedule) for schedule in schedules]
        self.waiting = sorted(range(len(schedules)), key=self.acts_from.__getitem__)
        # A pass cannot leave out the layers whose keys later ones borrow.
        self.latest_start = next(
            (index for index, each in enumerate(mllm.attentions) if lends_keys(each)), mllm.num_layers
        )
        self.start = self.next_start = 0  # the trunk runs from this layer on, in this pass and in the next one
        self.entering: Tensor | None = None  # [B, N, d] what the trunk enters layer `next_start` with
        self.strands: list[Strand] = []
        self.template: Any = None
        self.final: Tensor | None = None
        self.found: dict[int, Tensor] = {}

    def run(self) -> None:
        """Run the model until no branch waits."""
        model = self.mllm.model
        inputs = self.inputs.without_cache(model)
        while self.waiting or self.final is None:
            with drive_layers(self.mllm, self._run_layer):
                model(**inputs)
            if self.final is None:
                raise UnsupportedError(f"{type(model).__name__} did not run its decoder layers in order")
            self._collect()

    def _collect(self) -> None:
        """Take what the branches of a pass came to, and nothing else of them, for the next pass to have the memory."""
        while self.strands:
            strand = self.strands.pop()
            leaves = zip(strand.branches, strand.tree.leaves, strict=True)
            if strand.final is not None:
                self.found |= {branch: strand.final[leaf] for branch, leaf in leaves if leaf != TRUNK}

    def states(self) -> Tensor:
        """Final states [branches + 1, B, n, d] at the wanted positions; the last entry is the main pass."""
        assert self.final is not None
        found = self.final.expand(len(self.schedules) + 1, -1, -1, -1).clone()
        for branch, states in self.found.items():
            found[branch] = states
        return found

    # ------------------------------------------------------------------------ a layer

    def _run_layer(self, call: LayerCall) -> Any:
        if call.index == 0:
            self.start = self.next_start
            self._plan(call)
        if call.index < self.start:
            hidden = self._passed_over(call)
            self._remember(call.index, hidden)
            return with_states(self.template, hidden)
        self._check_order(call)
        segments = [segment for strand in self.strands for segment in strand.segments]
        for segment in segments:
            segment.enter(call)
        output, keys = self._main_pass(call)
        hidden = output_states(output)
        known = [strand.earlier(call, keys) for strand in self.strands]
        del keys  # not needed while branches run
        for strand, of_trunk in zip(self.strands, known, strict=True):
            strand.run(call, self.mllm.attentions[call.index], of_trunk)
        for segment in segments:
            segment.leave(hidden)
        self.template = output
        self._remember(call.index, hidden)
        if call.index == self.mllm.num_layers - 1:
            rows = torch.arange(self.batch_size, device=hidden.device)[:, None]
            self.final = hidden[rows, self.wanted]
        return output

    def _plan(self, call: LayerCall) -> None:
        """Decide, from the first layer's mask, what branches carry and whether prefixes can be shared."""
        if call.uses_flash:
            raise UnsupportedError(
                "flash attention takes no mask on single pairs; load the model with attention 'sdpa'"
            )
        valid = ~self.layout.padding
        if self.shared is not None and not self.shared.is_possible(call, self.layout):
            self.shared = None
        position = torch.arange(self.length, device=call.hidden.device)
        of_frame: dict[tuple[bool, tuple[int, ...]], list[int]] = {}
        for branch in self.waiting:
            action = next((self.actions[step] for step in self.schedules[branch] if step != NOTHING), None)
            if action is not None:
                first = torch.where(action.queries, position, self.length).amin(1)
                starts = tuple(torch.minimum(first, self.layout.last_prompt).tolist())
                of_frame.setdefault((self._is_of_image(action), starts), []).append(branch)
        room, self.waiting = STATES_A_TOKEN * self.tokens_at_once, []
        for (of_image, starts), branches in of_frame.items():
            own = valid & (position >= torch.tensor(starts, device=position.device)[:, None])
            if sees_ahead(call.mask, valid & ~own, own):  # prefix-LM: what comes before sees it
                own = valid
            shared = self.shared if of_image else None
            schedules = {branch: self.schedules[branch] for branch in branches}
            budget = Budget(self.tokens_at_once, room, 0 if self.strands else 1)
            strand = Strand(own, self.layout, self.actions, schedules, self.wanted, shared, budget)
            self.waiting += branches[len(strand.branches) :]
            if strand.branches:
                self.strands.append(strand)
                room -= strand.held
        self.next_start = min(self.latest_start, min((self.acts_from[branch] for branch in self.waiting), default=0))

    def _passed_over(self, call: LayerCall) -> Tensor:
        """What comes out of a layer that no branch of this pass needs: anything, but for the last one of them."""
        if call.index < self.start - 1:
            return call.hidden
        hidden, self.entering = self.entering, None
        assert hidden is not None
        return hidden

    def _remember(self, layer: int, hidden: Tensor) -> None:
        """Keep what the next pass starts with, if this is the layer before; the model may add to its own states."""
        if layer == self.next_start - 1:
            self.entering = hidden.clone()

    def _is_of_image(self, action: Intervention) -> bool:
        """Whether it changes what rows share, and in the same way for all that show one image."""
        if self.shared is None or not (action.queries & self.shared.mask).any():
            return False
        first = self.shared.selection.rows[self.shared.group]  # [B]
        pairs = ((each & self.shared.mask, each[first] & self.shared.mask) for each in (action.queries, action.keys))
        return all(torch.equal(mine, theirs) for mine, theirs in pairs)

    def _check_order(self, call: LayerCall) -> None:
        """Refuse a layer in which positions that no branch carries see what a branch changes."""
        for strand in self.strands:
            ahead = strand.segment.frame.own.remembered(
                "sees ahead", call.mask, partial(sees_ahead, call.mask, strand.before, strand.own)
            )
            if ahead:
                raise UnsupportedError(f"decoder layer {call.index} lets earlier positions see later ones, layer 0 not")

    def _main_pass(self, call: LayerCall) -> tuple[Any, tuple[Tensor, ...]]:
        """The layer of the model left alone; also its keys and values [B, heads, N, size], if it makes some."""
        attention = self.mllm.attentions[call.index]
        if attention is None or borrows_keys(attention):
            return call.run(past_key_values=None), ()
        everyone = torch.arange(self.batch_size, device=call.hidden.device)
        cache = Keys()
        if self.shared is None:
            output = call.run(past_key_values=cache)
            return output, cache.of(everyone)
        shared = self.shared
        hidden = call.hidden.clone() if call.index == 0 else call.hidden
        suffix = shared.suffix
        own = suffix.own.pack(hidden)
        output = shared.run(call, hidden, cache)
        earlier = cache.of(shared.group)
        behind = Keys(earlier)
        arguments = {**call.packed(suffix.own), "attention_mask": suffix.mask(call), "past_key_values": behind}
        with counting_from(attention, suffix.own.index, self.length):
            suffix.own.put_back(hidden, output_states(call.run(own, **arguments)))
        places = suffix.own.remembered("places in", shared, lambda: self._places_in(suffix))
        keys = tuple(take(torch.cat(each, dim=2), places) for each in zip(earlier, behind.of_all(), strict=True))
        return with_states(output, hidden), keys

    def _places_in(self, suffix: Frame) -> Tensor:
        """[B, N] where each position stands among the keys of the suffix; 0 for padding."""
        position = torch.arange(self.length, device=suffix.rows.device).expand(self.batch_size, -1)
        return locate(suffix.key_positions, suffix.key_valid, position.contiguous(), self.length)


def _first_action(schedule: Sequence[int]) -> int:
    """The first layer in which a schedule intervenes; their number if it never does."""
    return next((layer for layer, step in enumerate(schedule) if step != NOTHING), len(schedule))
