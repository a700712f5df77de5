"""Many interventions from one forward pass.

A branch is the model under one schedule: which intervention acts in which layer. Two branches are one as long as their
schedules agree, so branches form a tree whose trunk is the model left alone (the main pass); a layer runs once for each
node. Only positions from the first changed query on differ from the trunk: a node carries those, and attends to the
trunk's keys of the positions before them.

With L layers, a window [s, e) costs L - s layers on M of N positions. All L (L + 1) / 2 windows of an inverted path
share what they have in common: about L^3 / 6 node-layers instead of L^3 / 2.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dyvte.batch import Batch
from dyvte.errors import UnsupportedError
from dyvte.instrument.causal.groups import Intervention
from dyvte.instrument.hooks import LayerCall, Selection, drive_layers, output_states, with_states
from dyvte.instrument.kept_keys import locate, take
from dyvte.instrument.keys.places import counting_from
from dyvte.instrument.sweep.frames import Frame, Keys, SharedPrefix, or_all, repeat_argument
from dyvte.layout import TokenLayout
from dyvte.mllm import MLLM

TRUNK = -1
"""Stands for the main pass among the nodes of a tree."""

NOTHING = -1
"""Stands for no intervention in a schedule."""

KEY_COST = 8
"""Keys and values that a branch copies from the trunk weigh an eighth of a token that it runs."""


class Tree:
    """The distinct nodes of some schedules, layer by layer.

    Attributes:
        parents: for each layer, the node of the layer before that each node continues, or `TRUNK`.
        steps: for each layer, the intervention that acts on each node, or `NOTHING`.
        leaves: the node after the last layer that each schedule ends in, or `TRUNK`.

    Example:
        >>> tree = Tree([(0, -1), (0, 0), (-1, 0), (-1, -1)])
        >>> tree.parents, tree.steps, tree.leaves
        ([[-1], [0, 0, -1]], [[0], [-1, 0, 0]], [0, 1, 2, -1])
    """

    def __init__(self, schedules: Sequence[Sequence[int]]) -> None:
        self.parents: list[list[int]] = []
        self.steps: list[list[int]] = []
        self.leaves = [TRUNK] * len(schedules)
        for steps in zip(*schedules, strict=True):
            nodes: dict[tuple[int, int], int] = {}
            for branch, step in enumerate(steps):
                node = (self.leaves[branch], step)
                self.leaves[branch] = TRUNK if node == (TRUNK, NOTHING) else nodes.setdefault(node, len(nodes))
            self.parents.append([parent for parent, _ in nodes])
            self.steps.append([step for _, step in nodes])


@dataclass
class Strand:
    """The nodes whose schedules change the same positions first; they carry the same tokens.

    Attributes:
        frame: the tokens that run, and those before them.
        own, before: [B, N] the same as masks.
        layout: of the batch.
        actions: the interventions that the tree's steps refer to.
        branches: which branches of the engine these are.
        states: [n, B, M, d] of the nodes after the last layer that ran.
        trunk: [B, M, d] what the layer before gave in the main pass.
        entering: [B, M, d] what enters this layer there.
    """

    frame: Frame
    own: Tensor
    before: Tensor
    layout: TokenLayout
    actions: Sequence[Intervention]
    branches: list[int]
    tree: Tree
    states: Tensor | None = None
    trunk: Tensor | None = None
    entering: Tensor | None = None

    @classmethod
    def of(
        cls,
        own: Tensor,
        layout: TokenLayout,
        actions: Sequence[Intervention],
        branches: list[int],
        schedules: Sequence[Sequence[int]],
    ) -> Strand:
        """The strand of `branches` that carries the positions `own` [B, N]."""
        everyone = torch.arange(len(own), device=own.device)
        before = ~layout.padding & ~own
        counts = before.sum(1).tolist()
        frame = Frame(
            Selection.of(own, everyone, own.sum(1).tolist()),
            Selection.of(before, everyone, counts) if any(counts) else None,
        )
        tree = Tree([schedules[each] for each in branches])
        used = {step for each in branches for step in schedules[each]} - {NOTHING}
        if any(actions[step].mode != "cut" and (actions[step].keys & own).any() for step in used):
            raise UnsupportedError(
                "the image sees the question (prefix-LM attention): its keys cannot be replaced for the question alone"
            )
        return cls(frame, own, before, layout, actions, branches, tree)

    def enter(self, call: LayerCall) -> None:
        """Note what enters the layer; what the model adds between layers (DeepStack) goes to every node."""
        self.entering = self.frame.own.pack(call.hidden)
        if self.states is not None and self.trunk is not None:
            added = self.entering - self.trunk
            if added.any():
                self.states = self.states + added

    def run(self, call: LayerCall, keys: Tensor, values: Tensor, tokens_at_once: int) -> None:
        """Run the layer on every node, with the trunk's keys and values [B, heads, N, size] of earlier positions."""
        parents, steps = self.tree.parents[call.index], self.tree.steps[call.index]
        if not parents:
            return
        assert self.entering is not None
        rows, tokens, size = self.entering.shape
        width = self.frame.key_positions.shape[1]
        at_once = max(1, tokens_at_once // (rows * (tokens + width // KEY_COST)))
        earlier = self._earlier(keys, values, set(steps))
        packed = call.packed(self.frame.own)
        new = self.entering.new_empty(len(parents), rows, tokens, size)
        for first in range(0, len(parents), at_once):
            chunk = slice(first, min(first + at_once, len(parents)))
            before = [self.entering if parent == TRUNK else self._state(parent) for parent in parents[chunk]]
            times = len(before)
            arguments = {
                name: value if value is call.arguments.get(name) else repeat_argument(name, value, times)
                for name, value in packed.items()
                if name != "attention_mask"
            }
            arguments["attention_mask"] = self._masks(call, steps[chunk])
            arguments["past_key_values"] = Keys(
                self._earlier_of(earlier, steps[chunk]),
                self.frame.rows.repeat(times),
                self.frame.key_positions.repeat(times, 1),
            )
            states = output_states(call.run(torch.cat(before), **arguments))
            new[chunk] = states.view(times, rows, tokens, size)
        self.states = new

    def leave(self, hidden: Tensor) -> None:
        """Note what the main pass made of the layer [B, N, d]."""
        self.trunk = self.frame.own.pack(hidden)

    def _state(self, node: int) -> Tensor:
        assert self.states is not None
        return self.states[node]

    # -------------------------------------------------------------------------- masks

    def _masks(self, call: LayerCall, steps: Sequence[int]) -> Tensor | None:
        """The attention mask of some nodes [n * B, 1, M, K]."""
        masks = [self._mask(call, step) for step in steps]
        if all(each is None for each in masks):
            return None
        plain = self.frame.allowed(call)[:, None] if any(each is None for each in masks) else None
        return torch.cat([plain if each is None else each for each in masks])  # type: ignore[misc]

    def _mask(self, call: LayerCall, step: int) -> Tensor | None:
        mask = self.frame.mask(call)
        if step == NOTHING or self.actions[step].mode != "cut":
            return mask
        return self.frame.own.remembered(f"cut {step}", call.mask, lambda: self._cut(call, mask, self.actions[step]))

    def _cut(self, call: LayerCall, mask: Tensor | None, action: Intervention) -> Tensor:
        own, places = self.frame.own, self.frame.key_positions
        queries, keys = action.queries.gather(1, own.index), action.keys.gather(1, places)
        itself = own.index[:, :, None] == places[:, None, :]
        cut = (queries[:, :, None] & keys[:, None, :] & ~itself)[:, None]
        if mask is None:
            return self.frame.allowed(call)[:, None] & ~cut
        return mask & ~cut if mask.dtype == torch.bool else mask.masked_fill(cut, torch.finfo(mask.dtype).min)

    # ----------------------------------------------------------------- keys and values

    def _earlier(self, keys: Tensor, values: Tensor, steps: set[int]) -> dict[int, tuple[Tensor, Tensor]]:
        """Keys and values of the earlier positions [B, heads, E, size], as they are and as each intervention has them.

        Interventions that leave them alone have no entry.
        """
        earlier = self.frame.earlier
        if earlier is None:
            return {}
        found = {NOTHING: (take(keys, earlier.index), take(values, earlier.index))}
        for step in steps - {NOTHING}:
            action = self.actions[step]
            if action.mode != "cut":
                chosen = (action.keys.gather(1, earlier.index) & or_all(earlier.valid, earlier.index))[:, None, :, None]
                others = (self._replacement(each, action) for each in (keys, values))
                key, value = (torch.where(chosen, new, old) for new, old in zip(others, found[NOTHING], strict=True))
                found[step] = (key, value)
        return found

    def _replacement(self, tensor: Tensor, action: Intervention) -> Tensor:
        """What stands for the visual keys or values, [B, heads, E or 1, size]."""
        assert self.frame.earlier is not None
        index = self.frame.earlier.index
        if action.mode == "swap":
            assert action.donors is not None
            # Donor and receiver are aligned by how far a token is from the first one (see `check_donors`).
            first = self.layout.first_token
            moved = index + (first[action.donors] - first)[:, None]
            return take(tensor[action.donors], moved.clamp(0, tensor.shape[2] - 1))
        weights = self.layout.visual.to(tensor.dtype)
        weights = weights / weights.sum(1, keepdim=True).clamp(min=1)
        return (tensor * weights[:, None, :, None]).sum(2, keepdim=True)

    def _earlier_of(
        self, earlier: dict[int, tuple[Tensor, Tensor]], steps: Sequence[int]
    ) -> tuple[Tensor, Tensor] | None:
        if not earlier:
            return None
        chosen = [earlier.get(step, earlier[NOTHING]) for step in steps]
        if all(each is earlier[NOTHING] for each in chosen):
            return earlier[NOTHING]  # the same for all, copied once
        key, value = (torch.cat(list(each)) for each in zip(*chosen, strict=True))
        return key, value


class Branches:
    """One forward pass of a batch with branches riding along.

    Args:
        mllm: the model.
        inputs: the batch, answers behind the prompts.
        actions: the interventions that schedules refer to.
        schedules: for each branch the intervention that acts in each layer, or `NOTHING`; a branch keeps to one
            intervention.
        shared_image: [B] equal numbers for rows that share the main pass up to their image's last token.
        tokens_at_once: bounds memory.
    """

    def __init__(
        self,
        mllm: MLLM,
        inputs: Batch,
        actions: Sequence[Intervention],
        schedules: Sequence[Sequence[int]],
        shared_image: Sequence[int] | None,
        tokens_at_once: int | None,
    ) -> None:
        self.mllm, self.inputs, self.actions, self.schedules = mllm, inputs, actions, schedules
        self.layout = inputs.layout
        self.batch_size, self.length = self.layout.roles.shape
        self.tokens_at_once = tokens_at_once or self.batch_size * self.length
        self.shared = None
        if shared_image is not None and self.layout.visual.any():
            self.shared = SharedPrefix(self.layout, inputs["input_ids"], shared_image)
        self.strands: list[Strand] = []
        self.template: Any = None
        self.final: Tensor | None = None

    def run(self) -> None:
        """Run the model."""
        model = self.mllm.model
        inputs = {name: value for name, value in self.inputs.items() if name not in ("labels", "past_key_values")}
        if "logits_to_keep" in inspect.signature(model.forward).parameters:
            inputs["logits_to_keep"] = 1
        with drive_layers(self.mllm, self._run_layer):
            model(**{**inputs, "use_cache": False})
        if self.final is None:
            raise UnsupportedError(f"{type(model).__name__} did not run its decoder layers in order")

    def states_at(self, positions: Tensor) -> Tensor:
        """Final states [branches + 1, B, n, d] at positions [B, n]; the last entry is the main pass."""
        assert self.final is not None
        rows = torch.arange(self.batch_size, device=self.final.device)[:, None]
        trunk = self.final[rows, positions]
        found = trunk.expand(len(self.schedules) + 1, -1, -1, -1).clone()
        for strand in self.strands:
            if strand.states is None:
                continue
            own = strand.frame.own
            local = locate(own.index, or_all(own.valid, own.index), positions, self.length)
            for branch, leaf in zip(strand.branches, strand.tree.leaves, strict=True):
                if leaf != TRUNK:
                    found[branch] = strand.states[leaf].gather(1, local[:, :, None].expand_as(trunk))
            strand.states = None
        return found

    # ------------------------------------------------------------------------ a layer

    def _run_layer(self, call: LayerCall) -> Any:
        if call.index == 0:
            self._plan(call)
        self._check_order(call)
        for strand in self.strands:
            strand.enter(call)
        output, keys, values = self._main_pass(call)
        hidden = output_states(output)
        for strand in self.strands:
            with counting_from(self.mllm.attentions[call.index], strand.frame.own.index, self.length):
                strand.run(call, keys, values, self.tokens_at_once)
            strand.leave(hidden)
        self.template = output
        if call.index == self.mllm.num_layers - 1:
            self.final = hidden
        return output

    def _plan(self, call: LayerCall) -> None:
        """Decide, from the first layer's mask, what branches carry and whether prefixes can be shared."""
        if call.uses_flash:
            raise UnsupportedError(
                "flash attention takes no mask on single pairs; load the model with attention 'sdpa'"
            )
        valid = ~self.layout.padding
        if self.shared is not None:
            self.shared.check(call.hidden)
            if sees_ahead(call.mask, self.shared.mask, ~self.shared.mask & valid):
                self.shared = None
        position = torch.arange(self.length, device=call.hidden.device)
        of_frame: dict[tuple[int, ...], list[int]] = {}
        for branch, schedule in enumerate(self.schedules):
            action = next((self.actions[step] for step in schedule if step != NOTHING), None)
            if action is not None:
                first = torch.where(action.queries, position, self.length).amin(1)
                key = tuple(torch.minimum(first, self.layout.last_prompt).tolist())
                of_frame.setdefault(key, []).append(branch)
        for starts, branches in of_frame.items():
            own = valid & (position >= torch.tensor(starts, device=position.device)[:, None])
            if sees_ahead(call.mask, valid & ~own, own):  # prefix-LM: what comes before sees it
                own = valid
            self.strands.append(Strand.of(own, self.layout, self.actions, branches, self.schedules))

    def _check_order(self, call: LayerCall) -> None:
        """Refuse a layer in which positions that no branch carries see what a branch changes."""
        for strand in self.strands:
            ahead = strand.frame.own.remembered(
                "sees ahead", call.mask, partial(sees_ahead, call.mask, strand.before, strand.own)
            )
            if ahead:
                raise UnsupportedError(f"decoder layer {call.index} lets earlier positions see later ones, layer 0 not")

    def _main_pass(self, call: LayerCall) -> tuple[Any, Tensor, Tensor]:
        """The layer of the model left alone; also its keys and values [B, heads, N, size]."""
        everyone = torch.arange(self.batch_size, device=call.hidden.device)
        cache = Keys()
        if self.shared is None:
            output = call.run(past_key_values=cache)
            return output, *cache.of(everyone)
        shared = self.shared
        hidden = call.hidden.clone() if call.index == 0 else call.hidden
        output = call.run(shared.selection.pack(hidden), **{**call.packed(shared.selection), "past_key_values": cache})
        suffix = shared.suffix
        own = suffix.own.pack(hidden)
        for row, (group, length) in enumerate(zip(shared.groups, shared.lengths, strict=True)):
            hidden[row, :length] = output_states(output)[group, :length]
        earlier = cache.of(shared.group)
        behind = Keys(earlier)
        arguments = {**call.packed(suffix.own), "attention_mask": suffix.mask(call), "past_key_values": behind}
        with counting_from(self.mllm.attentions[call.index], suffix.own.index, self.length):
            suffix.own.put_back(hidden, output_states(call.run(own, **arguments)))
        assert behind.keys is not None
        assert behind.values is not None
        places = suffix.own.remembered("places in", shared, lambda: self._places_in(suffix))
        keys, values = (
            take(torch.cat(each, dim=2), places) for each in ((earlier[0], behind.keys), (earlier[1], behind.values))
        )
        return with_states(output, hidden), keys, values

    def _places_in(self, suffix: Frame) -> Tensor:
        """[B, N] where each position stands among the keys of the suffix; 0 for padding."""
        position = torch.arange(self.length, device=suffix.rows.device).expand(self.batch_size, -1)
        return locate(suffix.key_positions, suffix.key_valid, position.contiguous(), self.length)


def sees_ahead(mask: Tensor | None, queries: Tensor, keys: Tensor) -> bool:
    """Whether the mask lets any of the positions `queries` [B, N] see any of `keys` [B, N]: never if causal."""
    if mask is None or mask.ndim != 4:
        return False
    allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return bool((allowed[:, 0] & queries[:, :, None] & keys[:, None, :]).any())
