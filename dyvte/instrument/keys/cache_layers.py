"""Which layer takes the place of which in a KV cache, and caches that are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers.cache_utils import (
    BaseQuantizedLayer,
    Cache,
    CacheLayerMixin,
    DummyLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    StaticLayer,
)

from dyvte.errors import UnsupportedError
from dyvte.instrument.cache import KeptLayer
from dyvte.instrument.keys.borrowed import BorrowingLayer
from dyvte.instrument.keys.indexed import INDEXED, KeptIndexedLayer
from dyvte.instrument.keys.reference import REFERENCE, KeptReferenceLayer

_KEPT: dict[str, type[KeptLayer]] = {
    **dict.fromkeys(INDEXED, KeptIndexedLayer),
    **dict.fromkeys(REFERENCE, KeptReferenceLayer),
}
"""What takes the place of which special layer, by its name (they lie in the files of their models)."""


def kept_layer(cache: Cache, index: int, borrows: bool, under_policy: Callable[[], bool]) -> KeptLayer | BorrowingLayer:
    """Put a layer that stands for some positions in the place of layer `index` of an empty cache.

    Args:
        cache: that `check_cache` let pass.
        index: of the layer in the cache.
        borrows: whether the decoder layer takes the keys of an earlier one.
        under_policy: whether a policy still reads the cache.
    """
    while cache.layer_class_to_replicate is not None and len(cache.layers) <= index:
        cache.layers.append(cache.layer_class_to_replicate())
    replaced = cache.layers[index]
    layer: KeptLayer | BorrowingLayer
    if borrows:
        layer = BorrowingLayer(replaced, under_policy)
    else:
        kind = type(replaced).__name__
        layer = _KEPT.get(kind, KeptLayer)(replaced)
    cache.layers[index] = layer
    return layer


def restore_layers(cache: Cache) -> None:
    """Give an empty cache that was used under a policy before its own layers back."""
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, (KeptLayer, BorrowingLayer)) and layer.length == 0:
            cache.layers[index] = layer.replaced


_KNOWN_LAYERS = (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    DummyLayer,
    LinearAttentionLayer,
    KeptLayer,
    KeptIndexedLayer,
    KeptReferenceLayer,
    BorrowingLayer,
)


def check_cache(cache: Any) -> None:
    """Refuse a cache that cannot hold different positions in different layers.

    Raises:
        UnsupportedError: with the kind of cache by name.
    """
    if not isinstance(cache, Cache) or not hasattr(cache, "layers"):
        raise UnsupportedError(f"a {type(cache).__name__} cannot be used under a policy; use a DynamicCache")
    if getattr(cache, "offloading", False):
        raise UnsupportedError("an offloaded KV cache cannot be used under a policy; use a DynamicCache")
    if cache.layer_class_to_replicate not in (None, DynamicLayer):
        raise UnsupportedError(f"a {cache.layer_class_to_replicate.__name__} cannot be used under a policy")
    for index, layer in enumerate(cache.layers):
        if type(layer) in _KNOWN_LAYERS or type(layer).__name__ in _KEPT:
            continue
        if isinstance(layer, StaticLayer):
            reason = "a static KV cache reserves room for every position; use a DynamicCache"
        elif isinstance(layer, BaseQuantizedLayer):
            reason = "a quantised KV cache packs positions together; use a DynamicCache"
        elif not isinstance(layer, CacheLayerMixin):
            reason = "dyvte does not know which state this kind of layer holds"
        else:
            reason = "dyvte does not know what this kind of layer holds beside keys and values"
        raise UnsupportedError(f"cache layer {index} is a {type(layer).__name__}: {reason}")
