"""The positions that branches carry through the layers, and the tree that says which branches are one so far."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dyvte.errors import UnsupportedError
from dyvte.instrument.causal.groups import Intervention
from dyvte.instrument.hooks import LayerCall, Selection, output_states
from dyvte.instrument.kept_keys import locate, take
from dyvte.instrument.keys.places import counting_from
from dyvte.instrument.keys.shared import BranchSharing
from dyvte.instrument.sweep.frames import Frame, Keys, SharedPrefix, or_all, repeat_arguments
from dyvte.instrument.sweep.without_attention import run_whole_rows
from dyvte.layout import TokenLayout

TRUNK = -1
"""Stands for the main pass among the nodes of a tree."""

NOTHING = -1
"""Stands for no intervention in a schedule."""

KEY_COST = 8
"""Keys and values that a branch copies from the trunk weigh an eighth of a token that it runs."""

KeysOf = dict[int, tuple[Tensor, ...]]
"""Keys and values [b, heads, E, size] of earlier positions, an indexer's keys where a layer has one: as they are
(`NOTHING`) and as interventions have them."""


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

    def most_states(self, at_once: int) -> int:
        """How many nodes' states are held together at most, if `at_once` nodes run at a time.

        A node's state goes as soon as its last child runs; after the last layer none is held.

        Example:
            >>> Tree([(0, -1), (0, 0), (-1, 0), (-1, -1)]).most_states(2)
            1
        """
        held = most = 0
        for parents in self.parents[:-1]:
            waiting = Counter(parents)
            for first in range(0, len(parents), at_once):
                now = parents[first : first + at_once]
                waiting.subtract(now)
                held += len(now) - sum(parent != TRUNK and not waiting[parent] for parent in set(now))
                most = max(most, held)
        return most


@dataclass
class Segment:
    """Tokens that every node of a strand carries. b rows, M tokens of each.

    Attributes:
        frame: the tokens that run, and those before them.
        actions: the interventions that the tree's steps refer to.
        layout: of the batch.
        states: [b, M, d] of each node after the last layer that ran; None once every child has continued it.
        trunk: [b, M, d] what the layer before gave in the main pass; None while a layer runs.
        entering: [b, M, d] what enters this layer there; None between layers.
        sharing: keys that nodes left for later layers, where some layers borrow them.
        free: places for states, all of one tensor: states that outlive a layer would otherwise lie scattered over
            memory in whose gaps the layers' own tensors do not fit.
    """

    frame: Frame
    actions: Sequence[Intervention]
    layout: TokenLayout
    states: list[Tensor | None] = field(default_factory=list)
    trunk: Tensor | None = None
    entering: Tensor | None = None
    sharing: BranchSharing = field(default_factory=BranchSharing)
    free: list[Tensor] | None = None

    @classmethod
    def of(
        cls, own: Tensor, before: Tensor, rows: Tensor, actions: Sequence[Intervention], layout: TokenLayout
    ) -> Segment:
        """The positions `own` [B, N] of some rows, which also attend to those `before` [B, N]."""
        counts = before[rows].sum(1).tolist()
        earlier = Selection.of(before, rows, counts) if any(counts) else None
        return cls(Frame(Selection.of(own, rows, own[rows].sum(1).tolist()), earlier), actions, layout)

    @property
    def cost(self) -> int:
        """Of a node, in tokens that run."""
        rows, tokens = self.frame.own.index.shape
        return rows * (tokens + self.frame.key_positions.shape[1] // KEY_COST)

    def enter(self, call: LayerCall) -> None:
        """Note what enters the layer; what the model adds between layers (DeepStack) goes to every node."""
        self.entering = self.frame.own.pack(call.hidden)
        if self.trunk is not None and self.states:
            added = self.entering - self.trunk
            if added.any():
                for state in self.states:
                    if state is not None:
                        state += added
        self.trunk = None

    def leave(self, hidden: Tensor) -> None:
        """Note what the main pass made of the layer [B, N, d]."""
        self.entering = None
        self.trunk = self.frame.own.pack(hidden)

    def continued(self, parents: Sequence[int]) -> Tensor:
        """[n * b, M, d] what enters the layer for children of these nodes."""
        assert self.entering is not None
        found = [self.entering if parent == TRUNK else self.states[parent] for parent in parents]
        return joined([each for each in found if each is not None])

    def let_go(self, node: int) -> None:
        """Forget the state of a node."""
        state, self.states[node] = self.states[node], None
        if state is not None and self.free is not None:
            self.free.append(state)

    def kept(self, states: Tensor, places: int) -> list[Tensor | None]:
        """Copies of [n, b, M, d] that last to the next layer; there are never more of them than `places`."""
        if self.free is None:
            self.free = list(states.new_empty(places, *states.shape[1:]))
        return [self.free.pop().copy_(state) for state in states]

    def run(
        self,
        call: LayerCall,
        entering: Tensor,
        nodes: range,
        steps: Sequence[int],
        earlier: tuple[Tensor, ...] | None,
        keep_keys: bool,
    ) -> tuple[Tensor, Keys]:
        """Run the layer on some nodes: their states [n, b, M, d], and their own keys and values, if these are kept.

        Args:
            call: of the layer.
            entering: [n * b, M, d].
            nodes: their numbers.
            steps: what acts on each node.
            earlier: what stands in a cache of the earlier positions, [b or n * b, heads, E, size].
            keep_keys: whether its own keys and values are asked for.
        """
        times, packed = len(steps), call.packed(self.frame.own)
        arguments = repeat_arguments(call, {**packed, "attention_mask": None}, times)
        arguments["attention_mask"] = self._masks(call, steps)
        keys = Keys(earlier, self.frame.rows.repeat(times), self.frame.key_positions.repeat(times, 1), keep_keys)
        arguments["past_key_values"] = keys
        arguments |= self.sharing.on(call, self.frame.own, self.frame.key_positions, nodes)
        return output_states(call.run(entering, **arguments)).unflatten(0, (times, -1)), keys

    # -------------------------------------------------------------------------- masks

    def _masks(self, call: LayerCall, steps: Sequence[int]) -> Tensor | None:
        """The attention mask of some nodes [n * b, 1, M, K]."""
        masks = [self._mask(call, step) for step in steps]
        if all(each is None for each in masks):
            return None
        plain = self.frame.allowed(call)[:, None] if any(each is None for each in masks) else None
        return joined([plain if each is None else each for each in masks])  # type: ignore[misc]

    def _mask(self, call: LayerCall, step: int) -> Tensor | None:
        mask = self.frame.mask(call)
        if step == NOTHING or self.actions[step].mode != "cut":
            return mask
        return self.frame.own.remembered(f"cut {step}", call.mask, lambda: self._cut(call, mask, self.actions[step]))

    def _cut(self, call: LayerCall, mask: Tensor | None, action: Intervention) -> Tensor:
        own, places, rows = self.frame.own, self.frame.key_positions, self.frame.rows
        queries, keys = action.queries[rows].gather(1, own.index), action.keys[rows].gather(1, places)
        itself = own.index[:, :, None] == places[:, None, :]
        cut = (queries[:, :, None] & keys[:, None, :] & ~itself)[:, None]
        if mask is None:
            return self.frame.allowed(call)[:, None] & ~cut
        return mask & ~cut if mask.dtype == torch.bool else mask.masked_fill(cut, torch.finfo(mask.dtype).min)

    # ----------------------------------------------------------------- keys and values

    def earlier(self, keys: Sequence[Tensor], steps: set[int]) -> KeysOf:
        """The earlier ones of the trunk's keys and values [B, heads, N, size], also as interventions have them."""
        earlier = self.frame.earlier
        if earlier is None:
            return {}
        found: KeysOf = {NOTHING: tuple(take(each[earlier.rows], earlier.index) for each in keys)}
        for step in steps - {NOTHING}:
            action = self.actions[step]
            if action.mode != "cut":
                chosen = (action.keys.gather(1, earlier.index) & or_all(earlier.valid, earlier.index))[:, None, :, None]
                others = (self._replacement(each, action) for each in keys)
                pairs = zip(others, found[NOTHING], strict=True)
                found[step] = tuple(torch.where(chosen, new, old) for new, old in pairs)
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


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """The tensors one behind the other; a single one as it is, without a copy."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def earlier_of(earlier: KeysOf, steps: Sequence[int]) -> tuple[Tensor, ...] | None:
    """Earlier keys and values of nodes with these steps."""
    if not earlier:
        return None
    chosen = [earlier.get(step, earlier[NOTHING]) for step in steps]
    if all(each is earlier[NOTHING] for each in chosen):
        return earlier[NOTHING]  # the same for all, copied once
    return tuple(joined(each) for each in zip(*chosen, strict=True))


@dataclass
class SharedImage:
    """What the rows that show one image have in common, carried once for all of them.

    Attributes:
        segment: of one row an image.
        group: [B] its row in there (0 for rows whose image's tokens nothing changes).
        changed: [B, E] which earlier positions of the rows' own segment it carries.
        places: [B, E] where in it these stand.
    """

    segment: Segment
    group: Tensor
    changed: Tensor
    places: Tensor

    def into(self, earlier: tuple[Tensor, ...], carried: Keys, times: int) -> tuple[Tensor, ...]:
        """Earlier keys and values [n * B, heads, E, size] with those that the nodes made of the image."""
        return tuple(self._into(*each, times) for each in zip(earlier, carried.of_all(), strict=True))

    def _into(self, earlier: Tensor, carried: Tensor, times: int) -> Tensor:
        of_rows = carried.unflatten(0, (times, -1))[:, self.group].flatten(0, 1)
        moved = take(of_rows, self.places.repeat(times, 1)).unflatten(0, (times, -1))
        return torch.where(self.changed[:, None, :, None], moved, earlier).flatten(0, 1)


@dataclass(frozen=True)
class Budget:
    """What the nodes of a strand may take up.

    Attributes:
        at_once: tokens that run through a layer at once, if one node does not need more.
        held: tokens whose states are held between layers.
        least: branches that run however many tokens they take.
    """

    at_once: int
    held: int
    least: int


class Strand:
    """The nodes whose schedules change the same positions first; they carry the same tokens.

    Args:
        own: [B, N] the positions that nodes carry.
        layout: of the batch.
        actions: the interventions that the tree's steps refer to.
        schedules: of the engine's branches that these nodes are for, by number.
        wanted: [B, n] positions whose states are kept after the last layer.
        shared: images whose tokens are carried once for all rows that show them, if there are such.
        budget: bounds memory.

    Attributes:
        branches: the first of those given, as many as there is room for; possibly none.
        held: tokens whose states are held at most.
        final: [nodes, B, n, d] of the last layer; one tensor, for the reason of `Segment.free`.
    """

    def __init__(
        self,
        own: Tensor,
        layout: TokenLayout,
        actions: Sequence[Intervention],
        schedules: Mapping[int, Sequence[int]],
        wanted: Tensor,
        shared: SharedPrefix | None,
        budget: Budget,
    ) -> None:
        self.own = own
        self.before = ~layout.padding & ~own
        used = {step for steps in schedules.values() for step in steps} - {NOTHING}
        if any(actions[step].mode != "cut" and (actions[step].keys & own).any() for step in used):
            raise UnsupportedError(
                "the image sees the question (prefix-LM attention): its keys cannot be replaced for the question alone"
            )
        everyone = torch.arange(len(own), device=own.device)
        of_image = torch.zeros_like(own) if shared is None else own & shared.mask
        self.segment = Segment.of(own & ~of_image, self.before | of_image, everyone, actions, layout)
        self.image: SharedImage | None = None
        if shared is not None:
            self.image = self._shared(of_image, shared, actions, layout)
        mine = self.segment.frame.own
        self.wanted = locate(mine.index, or_all(mine.valid, mine.index), wanted, own.shape[1])
        self.final: Tensor | None = None
        self.tokens_at_once = budget.at_once
        self.at_once = max(1, budget.at_once // sum(each.cost for each in self.segments))
        of_node = sum(each.frame.own.index.numel() for each in self.segments)

        def held(number: int) -> int:
            return of_node * Tree(list(schedules.values())[:number]).most_states(self.at_once)

        number = max(budget.least, bisect_right(range(1, len(schedules) + 1), budget.held, key=held))
        self.branches, self.held = list(schedules)[:number], held(number)
        self.tree = Tree(list(schedules.values())[:number])

    def _shared(
        self, of_image: Tensor, shared: SharedPrefix, actions: Sequence[Intervention], layout: TokenLayout
    ) -> SharedImage:
        carried = of_image[shared.selection.rows].any(1)
        rows = shared.selection.rows[carried]
        group = (carried.cumsum(0) - 1).clamp(min=0)[shared.group]
        segment = Segment.of(of_image, self.before, rows, actions, layout)
        earlier, own = self.segment.frame.earlier, segment.frame.own
        assert earlier is not None
        changed = of_image.gather(1, earlier.index) & or_all(earlier.valid, earlier.index)
        places = locate(own.index[group], or_all(own.valid, own.index)[group], earlier.index, of_image.shape[1])
        return SharedImage(segment, group, changed, places)

    @property
    def segments(self) -> list[Segment]:
        """What nodes carry, in the order in which it runs."""
        return [self.segment] if self.image is None else [self.image.segment, self.segment]

    def earlier(self, call: LayerCall, keys: Sequence[Tensor]) -> list[KeysOf]:
        """For each segment, what its nodes take from the trunk's keys and values [B, heads, N, size] in this layer."""
        steps = set(self.tree.steps[call.index])
        if not keys or not steps:
            return [{} for _ in self.segments]
        return [each.earlier(keys, steps) for each in self.segments]

    def run(self, call: LayerCall, attention: nn.Module | None, known: Sequence[KeysOf]) -> None:
        """Run the layer on every node, with `earlier` keys and values.

        A layer that does not attend has none, nor scores to cut: it runs on whole rows.
        """
        parents, steps = self.tree.parents[call.index], self.tree.steps[call.index]
        if not parents:
            return
        for each in self.segments:
            each.sharing.follow(parents)
        last = call.index == len(self.tree.parents) - 1
        at_once, places = self.at_once, self.tree.most_states(self.at_once)
        made: list[list[Tensor | None]] = [[] for _ in self.segments]
        if last and (states := self.segment.entering) is not None:
            self.final = states.new_empty(len(parents), *self.wanted.shape, states.shape[-1])
        waiting = Counter(parents)
        for first in range(0, len(parents), at_once):
            of, now = parents[first : first + at_once], steps[first : first + at_once]
            nodes = range(first, first + len(of))
            entering = [each.continued(of) for each in self.segments]
            self._let_go(of, waiting)
            carried: Keys | None = None
            for segment, given, new, found in zip(self.segments, known, made, entering, strict=True):
                earlier = earlier_of(given, now)
                if carried is not None:
                    assert self.image is not None
                    assert earlier is not None
                    earlier = self.image.into(earlier, carried, len(now))
                if attention is None:
                    of_nodes = found.unflatten(0, (len(now), -1))
                    states = run_whole_rows(call, segment.frame.own, of_nodes, self.tokens_at_once)
                else:
                    with counting_from(attention, segment.frame.own.index, self.own.shape[1]):
                        states, carried = segment.run(call, found, nodes, now, earlier, segment is not self.segment)
                if not last:
                    new.extend(segment.kept(states, places))
                elif segment is self.segment:
                    where = self.wanted[None, :, :, None].expand(len(now), -1, -1, states.shape[-1])
                    assert self.final is not None
                    self.final[first : first + len(now)] = states.gather(2, where)
            del entering, found, states  # before the next nodes run
        for segment, new in zip(self.segments, made, strict=True):
            segment.states = new
            if last:
                segment.free = None

    def _let_go(self, parents: Sequence[int], waiting: Counter[int]) -> None:
        """Forget the states of nodes that none of their children waits for any more: there are many nodes."""
        for parent in parents:
            waiting[parent] -= 1
            if parent != TRUNK and not waiting[parent]:
                for segment in self.segments:
                    segment.let_go(parent)
