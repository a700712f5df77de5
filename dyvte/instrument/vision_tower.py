"""Watching a vision tower: what it says about every visual token, before the decoder sees one.

The tower runs unchanged. Attention is computed anew, some queries at a time, from the queries and keys that its
attention functions were called with; no map is kept. Values of patches go to decoder positions through the family's own
merger, pooling or packing of tiles.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, is_dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dyvte.cost.flops import overhead
from dyvte.errors import UnsupportedError
from dyvte.instrument.attention_calls import AttentionCall, watch_attention
from dyvte.instrument.hooks import output_states, override_method
from dyvte.instrument.role_attention import MAP_ENTRIES, allowed_by
from dyvte.instrument.vision_patches import PATCHES, patch_places, patches_to_tokens
from dyvte.model_parts import self_attention_of

if TYPE_CHECKING:
    from dyvte.mllm import MLLM

TOWERS = ("visual", "vision_tower", "vision_model")
"""What families call their tower."""


@dataclass(frozen=True)
class TowerNeeds:
    """What to take from which encoder layers (0-based; negative ones count from the last, -1).

    Attributes:
        attention: layers whose attention to every patch is taken: the class token's row, or the mean over all queries
            where the tower has no class token; mean over heads.
        keys: layers whose keys are taken.
        features: layers whose output states are taken. -2 is what LLaVA shows its projector.
    """

    attention: Sequence[int] = ()
    keys: Sequence[int] = ()
    features: Sequence[int] = ()

    def __bool__(self) -> bool:
        return bool(self.attention or self.keys or self.features)


@dataclass
class TowerTokens:
    """What the tower says about T visual tokens, in the order of the decoder's positions.

    A token that a merger or pooling makes of several patches has the mean of their values. A separator, which a family
    puts between rows of patches and which no patch belongs to, has zeros, and view -1.

    Attributes:
        view: [T] number of the picture (tile) that the token is of, counted through the batch.
        place: [T, 2] row and column of the token in its view, in patches; -1 for a separator.
        attentions: by layer, [T] attention that the token gets (see `TowerNeeds`).
        all_keys: by layer, [T, c] keys, heads one after another (after rotary positions, where the tower has them).
        states: by layer, [T, c] output states of the layer.
        class_queries: by layer whose keys were asked for, [V, c] the class token's query in each of the V views, heads
            one after another; empty without class token.
        class_states: by layer whose features were asked for, [V, c] the class token's; empty without class token.
        num_heads: of the tower.
        num_layers: of the tower.
    """

    view: Tensor
    place: Tensor
    attentions: dict[int, Tensor]
    all_keys: dict[int, Tensor]
    states: dict[int, Tensor]
    class_queries: dict[int, Tensor]
    class_states: dict[int, Tensor]
    num_heads: int
    num_layers: int

    def attention(self, layer: int) -> Tensor:
        """[T] attention in a layer."""
        return self.attentions[layer % self.num_layers]

    def keys(self, layer: int) -> Tensor:
        """[T, c] keys of a layer, all heads."""
        return self.all_keys[layer % self.num_layers]

    def mean_keys(self, layer: int) -> Tensor:
        """[T, head size] keys of a layer, mean over heads."""
        return self.keys(layer).unflatten(-1, (self.num_heads, -1)).mean(-2)

    def features(self, layer: int) -> Tensor:
        """[T, c] output states of a layer."""
        return self.states[layer % self.num_layers]

    def of_class_token(self, values: dict[int, Tensor], layer: int) -> Tensor:
        """[T, c] values of the class token (`class_queries`, `class_states`), for every token those of its view.

        Raises:
            UnsupportedError: the tower has no class token.
        """
        if layer % self.num_layers not in values:
            raise UnsupportedError("this vision tower has no class token, whose query or state is asked for")
        return values[layer % self.num_layers][self.view.clamp(min=0)]

    def class_query_attention(self, layer: int) -> Tensor:
        """[T] softmax within a view of the class token's query times keys, all heads as one (PruMerge).

        Raises:
            UnsupportedError: the tower has no class token.
        """
        query, keys = self.of_class_token(self.class_queries, layer).float(), self.keys(layer).float()
        logits = (query * keys).sum(-1) * keys.shape[-1] ** -0.5
        result = torch.zeros_like(logits)
        for view in self.view.unique().tolist():
            inside = self.view == view
            if view >= 0:
                result[inside] = logits[inside].softmax(0)
        return result

    def at(self, index: Tensor) -> TowerTokens:
        """The tokens at `index` [n] (of T)."""

        def pick(values: dict[int, Tensor]) -> dict[int, Tensor]:
            return {layer: value[index] for layer, value in values.items()}

        return replace(
            self,
            view=self.view[index],
            place=self.place[index],
            attentions=pick(self.attentions),
            all_keys=pick(self.all_keys),
            states=pick(self.states),
        )


class VisionTower:
    """The vision tower of a model, its encoder layers and how its patches become visual tokens.

    Raises:
        UnsupportedError: the family's way from patches to visual tokens is not known exactly.
    """

    def __init__(self, mllm: MLLM) -> None:
        self.mllm = mllm
        self.family = mllm.model.config.model_type
        if self.family not in PATCHES:
            raise UnsupportedError(
                f"the vision tower of model type {self.family!r} is not mapped to its visual tokens; mapped are "
                f"{', '.join(sorted(PATCHES))}"
            )
        self.owner: Any = mllm.model.base_model
        self.tower: Any = next(getattr(self.owner, name) for name in TOWERS if hasattr(self.owner, name))
        stacks = [module for module in self.tower.modules() if isinstance(module, nn.ModuleList)]
        self.layers = max((list(stack) for stack in stacks), key=len)
        self.attentions = [self_attention_of(layer) for layer in self.layers]
        if None in self.attentions:
            raise UnsupportedError(f"a layer without self-attention in the vision tower of {self.family!r}")
        embeddings = getattr(self.tower, "embeddings", None)
        self.has_class_token = hasattr(embeddings, "class_embedding") or hasattr(embeddings, "cls_token")

    @property
    def num_layers(self) -> int:
        """Number of encoder layers."""
        return len(self.layers)

    def index(self, layer: int) -> int:
        """A layer's index counted from the first.

        Raises:
            UnsupportedError: the tower has no such layer.
        """
        if not -self.num_layers <= layer < self.num_layers:
            raise UnsupportedError(
                f"the vision tower has {self.num_layers} layers, so there is no layer {layer}; give one of "
                f"{-self.num_layers}..{self.num_layers - 1}"
            )
        return layer % self.num_layers

    @contextmanager
    def watch(self, needs: TowerNeeds) -> Iterator[TowerWatch]:
        """Within the block every run of the tower is looked at; the last one is `TowerWatch.tokens`."""
        wanted = {
            name: frozenset(self.index(layer) for layer in getattr(needs, name))
            for name in ("attention", "keys", "features")
        }
        watch = TowerWatch()
        original = self.owner.get_image_features
        parameters = inspect.signature(original)

        def look(*args: Any, **kwargs: Any) -> tuple[Any, TowerTokens]:
            record = _Record(self, wanted)
            with record.recording():
                output = original(*args, **kwargs)
            arguments = parameters.bind(*args, **kwargs)
            arguments.apply_defaults()
            named = arguments.arguments
            with overhead(), torch.no_grad():
                return output, self._tokens(record, {**named, **named.get("kwargs", {})}, output)

        def get_image_features(*args: Any, **kwargs: Any) -> Any:
            output, watch.tokens = _remembered(tuple(wanted.items()), look, args, kwargs)
            watch.seen = getattr(output, "last_hidden_state", None)
            return output

        with override_method(self.owner, "get_image_features", get_image_features):
            yield watch

    def _tokens(self, record: _Record, arguments: Mapping[str, Any], output: Any) -> TowerTokens:
        features = output.pooler_output
        expected = sum(len(each) for each in features)

        def mapped(values: Tensor) -> Tensor:
            tokens = patches_to_tokens(self, values, arguments)
            if len(tokens) != expected:
                raise UnsupportedError(
                    f"{len(tokens)} visual tokens of {self.family!r} come from the patches of the tower, but the model "
                    f"makes {expected} of them; inputs of this kind are not mapped"
                )
            return tokens

        def without_class_token(values: Tensor) -> Tensor:
            return values[:, 1:] if self.has_class_token else values

        def of_layers(values: dict[int, Tensor]) -> dict[int, Tensor]:
            return {layer: mapped(without_class_token(value)).nan_to_num(0.0) for layer, value in values.items()}

        first = next(iter({**record.attention, **record.keys, **record.features}.values()))
        views, patches = without_class_token(first).shape[:2]
        places = patch_places(self, views, patches, arguments).to(first.device)
        view, *place = mapped(places).nan_to_num(-1.0).unbind(1)
        return TowerTokens(
            view=view.round().long(),
            place=torch.stack(place, dim=1),
            attentions={layer: values[:, 0] for layer, values in of_layers(record.attention).items()},
            all_keys=of_layers(record.keys),
            states=of_layers(record.features),
            class_queries=record.class_queries,
            class_states=record.class_states,
            num_heads=record.num_heads,
            num_layers=self.num_layers,
        )


@dataclass
class ImageMemory:
    """What `remember_images` keeps of images, by a digest of what the tower was given and by what was looked at.

    Attributes:
        left: bytes that more images may take.
        made: what is kept.
    """

    left: int
    made: dict[Hashable, Any] = field(default_factory=dict)

    def recall(self, looked_at: Hashable, digest: bytes, look: Callable[[], tuple[Any, Any]]) -> tuple[Any, Any]:
        """The output of the tower and what was seen of it: as kept, or made by `look` and kept where there is room."""
        keys: tuple[Hashable, Hashable] = (digest, (looked_at, digest))
        if not all(key in self.made for key in keys):
            found = look()
            new = {key: each for key, each in zip(keys, found, strict=True) if key not in self.made}
            size = sum(each.nbytes for each in _tensors(list(new.values())))
            if size > self.left:
                return found
            self.left -= size
            self.made |= new
        output, seen = (self.made[key] for key in keys)
        return copy.copy(output), seen  # some models write into what they are given


_MEMORY: ContextVar[ImageMemory | None] = ContextVar("_MEMORY", default=None)


@contextmanager
def remember_images(mllm: MLLM, memory: ImageMemory) -> Iterator[None]:
    """Within the block an image is encoded once, however many policies are asked about it.

    What a policy sees of the tower is kept too, nothing of passes that track gradients. FLOPs and times counted within
    the block lack the tower where its output is remembered.

    Example:
        >>> from dyvte.instrument.vision_tower import ImageMemory, remember_images
        >>> with torch.no_grad(), remember_images(mllm, ImageMemory(left=2**20)):
        ...     first, second = (mllm(**batch).logits for _ in range(2))  # the second runs the decoder alone
        >>> bool(torch.equal(first, second))
        True
    """
    owner: Any = mllm.model.base_model
    if not hasattr(owner, "get_image_features"):  # this family encodes images elsewhere
        yield
        return
    original = owner.get_image_features

    def get_image_features(*args: Any, **kwargs: Any) -> Any:
        return _remembered((), lambda *args, **kwargs: (original(*args, **kwargs), None), args, kwargs)[0]

    token = _MEMORY.set(memory)
    try:
        with override_method(owner, "get_image_features", get_image_features):
            yield
    finally:
        _MEMORY.reset(token)


def _remembered(looked_at: Hashable, look: Callable[..., tuple[Any, Any]], args: Any, kwargs: Any) -> tuple[Any, Any]:
    memory = _MEMORY.get()
    if memory is None or torch.is_grad_enabled():
        return look(*args, **kwargs)
    digest = hashlib.sha256(repr((args, kwargs)).encode())
    for tensor in _tensors((args, kwargs)):
        digest.update(repr((tensor.shape, tensor.dtype)).encode())
        digest.update(tensor.contiguous().cpu().flatten().view(torch.uint8).numpy().data)

    def look_anew() -> tuple[Any, Any]:
        output, seen = look(*args, **kwargs)
        for name in ("hidden_states", "attentions"):  # of every layer, which no decoder reads
            if getattr(output, name, None) is not None:
                output[name] = None
        return output, seen

    token = _MEMORY.set(None)  # what looks at the tower runs it
    try:
        return memory.recall(looked_at, digest.digest(), look_anew)
    finally:
        _MEMORY.reset(token)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors(each)
    elif is_dataclass(value):
        yield from _tensors(vars(value))


@dataclass
class TowerWatch:
    """What was seen of a tower.

    Attributes:
        tokens: of the last run of the tower, None before the first.
        seen: the tower's last states in that run.
    """

    tokens: TowerTokens | None = None
    seen: Tensor | None = field(default=None, repr=False)


@dataclass
class _Record:
    """One run of a tower, values by layer: attention [V, S, 1], keys and features [V, S, c] of V views of S patches.

    The class token's query and state are [V, c].
    """

    owner: VisionTower
    wanted: dict[str, frozenset[int]]
    attention: dict[int, Tensor] = field(default_factory=dict)
    keys: dict[int, Tensor] = field(default_factory=dict)
    class_queries: dict[int, Tensor] = field(default_factory=dict)
    class_states: dict[int, Tensor] = field(default_factory=dict)
    features: dict[int, Tensor] = field(default_factory=dict)
    num_heads: int = 1

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Within the block the tower is looked at."""
        with ExitStack() as stack:
            for layer in self.wanted["features"]:
                stack.enter_context(self.owner.layers[layer].register_forward_hook(self._keep(layer)))
            if self.wanted["attention"] or self.wanted["keys"]:
                stack.enter_context(watch_attention(self.owner, self._see))  # type: ignore[arg-type]
            yield

    def _keep(self, layer: int) -> Callable[..., None]:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            states = output_states(output).detach()
            self.features[layer] = states[None] if states.ndim == 2 else states
            if self.owner.has_class_token:
                self.class_states[layer] = self.features[layer][:, 0]

        return keep

    @torch.no_grad()
    def _see(self, layer: int, call: AttentionCall) -> None:
        self.num_heads = call.query.shape[1]
        with overhead():
            if layer in self.wanted["attention"]:
                self._append(self.attention, layer, self._attention(call)[:, :, None])
            if layer in self.wanted["keys"]:
                self._append(self.keys, layer, call.key.transpose(1, 2).flatten(2))
                if self.owner.has_class_token:
                    self.class_queries[layer] = call.query[:, :, 0].flatten(1)

    def _append(self, values: dict[int, Tensor], layer: int, value: Tensor) -> None:
        # a windowed tower calls its attention function once a window, on one long row of patches
        values[layer] = value if layer not in values else torch.cat([values[layer], value], dim=1)

    def _attention(self, call: AttentionCall) -> Tensor:
        """[V, S] of the class token, or the mean over the queries that see a patch; those of padding are none."""
        if call.softcap is not None:
            raise UnsupportedError(f"the vision tower of {self.owner.family!r} caps its scores; it is not mapped")
        if self.owner.has_class_token:
            return _attention_rows(call, slice(0, 1)).mean(1)[:, 0]
        views, heads, length = call.query.shape[:3]
        at_once = max(1, MAP_ENTRIES // (views * heads * call.key.shape[2]))
        received = call.query.new_zeros(views, call.key.shape[2], dtype=torch.float32)
        queries = torch.zeros_like(received)
        for start in range(0, length, at_once):
            rows = slice(start, min(start + at_once, length))
            seen = _seen_patches(call, rows)
            received += (_attention_rows(call, rows).mean(1) * seen).sum(1)
            queries += seen.sum(1)
        return received / queries.clamp(min=1)


def _attention_rows(call: AttentionCall, queries: slice) -> Tensor:
    """[V, H, q, S] attention of a slice of the queries, in float32."""
    if call.weights is not None:
        return call.weights[:, :, queries].float()
    scores = (call.query[:, :, queries].float() * call.scale) @ call.key.float().transpose(2, 3)
    if call.mask is not None:
        scores = scores.masked_fill(~allowed_by(call.mask[:, :, queries]), -torch.inf)
    return scores.softmax(-1)


def _seen_patches(call: AttentionCall, queries: slice) -> Tensor:
    """[V or 1, q, S] which patches a slice of the queries sees; queries of padding, none."""
    if call.mask is None:
        return torch.ones(1, queries.stop - queries.start, call.key.shape[2], device=call.key.device)
    mask = call.mask[:, 0]
    return allowed_by(mask[:, queries]) & allowed_by(mask.diagonal(dim1=1, dim2=2)[:, queries, None])
