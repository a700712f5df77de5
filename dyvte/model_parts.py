"""Finding the parts of a multimodal LLM: its text decoder, attention modules, image placeholders, inner models."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from dyvte.errors import ModelError


def text_config_of(model: nn.Module) -> Any:
    """The configuration of the text decoder."""
    config: Any = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        raise ModelError(f"{type(model).__name__} is not a transformers model")
    return config.get_text_config(decoder=True)


def check_nature(model: nn.Module) -> None:
    """Refuse an architecture whose decoder does not hold the image in its sequence, by what it is."""
    config: Any = model.config
    name, wanted = type(model).__name__, "dyvte needs visual tokens in the sequence of the decoder"
    parts = [config, *(getattr(config, part, None) for part in ("text_config", "decoder"))]
    if any(getattr(part, "is_encoder_decoder", False) for part in parts):
        raise ModelError(
            f"{name} is an encoder-decoder: its decoder reads the image through cross-attention, and {wanted}"
        )
    if getattr(config, "canvas_length", None):
        raise ModelError(
            f"{name} generates blocks by diffusion: its decoder sees the image through the cache of an encoder pass, "
            f"and {wanted}"
        )
    if getattr(config, "max_action_dim", None):
        raise ModelError(f"{name} generates actions of a robot by diffusion, not text: there is no answer to look at")
    crossing = next((module for module in _beside_towers(model) if _crosses(module)), None)
    if crossing is not None:
        raise ModelError(f"{name} reads its encoder through cross-attention ({type(crossing).__name__}), and {wanted}")
    if not config.sub_configs:
        raise ModelError(f"{name} has no image side (model type {config.model_type!r}): it is a language model")


TOWERS = ("vision", "visual", "qformer", "connector", "projector", "resampler", "audio")
"""Words in the names of the parts that turn images into visual tokens; cross-attention within them is their own."""


def _beside_towers(model: nn.Module) -> Iterator[nn.Module]:
    for name, child in model.named_children():
        if not any(word in name for word in TOWERS):
            yield child
            yield from _beside_towers(child)


def _crosses(module: nn.Module) -> bool:
    names = [name for name, _ in module.named_children()]
    return "CrossAttention" in type(module).__name__ or any(
        "cross_attn" in name or "crossattention" in name for name in names
    )


VISUAL_MARKS = "image_embeds_position_mask"
"""Input [B, N] of models without an image token (Kosmos-2) that is 1 where a visual token stands."""


def visual_token_ids_of(model: nn.Module, processor: Any) -> tuple[int, ...]:
    """Placeholder ids, the image's first: from the config, else from the processor; none where the inputs mark them."""
    config: Any = model.config
    found = [getattr(config, name, None) for name in ("image_token_id", "image_token_index")]
    found.append(getattr(processor, "image_token_id", None))
    image_ids = [each for each in found if isinstance(each, int) and each >= 0]
    video = [getattr(config, name, None) for name in ("video_token_id", "video_token_index")]
    video_ids = [each for each in video if isinstance(each, int) and each >= 0]
    takes = inspect.signature(model.forward).parameters
    if not image_ids and not video_ids and VISUAL_MARKS in takes:
        return ()
    if not image_ids and not video_ids:
        model_without = f"{type(model).__name__} (model type {config.model_type!r}) has no image token"
        if "pixel_values" in takes:
            raise ModelError(
                f"{model_without}: it adds visual tokens to the sequence itself, input_ids have no position for them, "
                "and dyvte finds the roles of positions by their ids"
            )
        raise ModelError(
            f"{model_without}: dyvte needs a multimodal LLM that puts visual tokens into the sequence of its decoder"
        )
    return tuple(dict.fromkeys([*image_ids[:1], *video_ids]))


def find_decoder(model: nn.Module, text_config: Any) -> tuple[nn.Module, nn.ModuleList]:
    """The text decoder stack and its layers.

    `get_decoder()` may return the stack, a causal LM around it, or the whole model with its vision tower, so the layers
    are looked for below it, first where the config is the decoder's.
    """
    get_decoder = getattr(model, "get_decoder", None)
    root = get_decoder() if get_decoder is not None else model
    candidates = [
        (module, child)
        for module in root.modules()
        for child in module.children()
        if isinstance(child, nn.ModuleList) and len(child) == text_config.num_hidden_layers
        if any(self_attention_of(layer) is not None for layer in child)
    ]
    if not candidates:
        raise ModelError(
            f"{type(model).__name__}: found no list of {text_config.num_hidden_layers} decoder layers below "
            f"{type(root).__name__}"
        )
    text_type = text_config.model_type
    of_text = [pair for pair in candidates if getattr(getattr(pair[0], "config", None), "model_type", "") == text_type]
    decoder, layers = (of_text or candidates)[0]
    return decoder, layers


def output_embeddings_of(model: Any) -> nn.Module | None:
    """The output embedding module: of the model, or of the language model in it where it only hands logits on."""
    heads = (
        each.get_output_embeddings() for each in (model, *model.children()) if hasattr(each, "get_output_embeddings")
    )
    return next((head for head in heads if head is not None), None)


def self_attention_of(layer: nn.Module) -> nn.Module | None:
    """The self-attention module among the children of a decoder layer."""
    for name in ("self_attn", "self_attention", "attention", "attn"):
        module = getattr(layer, name, None)
        if isinstance(module, nn.Module):
            return module
    mixer = getattr(layer, "mixer", None)  # of any kind, in a layer that has one of several
    return mixer if isinstance(mixer, nn.Module) and type(mixer).__name__.endswith("Attention") else None


RUNNING_STATE = ("linear_attention", "conv")
"""Kinds of decoder layer, as in `layer_types`, that carry a state from position to position instead of attending."""

EACH_ALONE = ("moe", "mlp")
"""Kinds of decoder layer in which every position is by itself."""


_OTHER_STATES = {
    **dict.fromkeys(("mamba", "recurrent"), "dyvte does not know how its running state is built"),
    **dict.fromkeys(
        ("hybrid", "hybrid_sliding"),
        "it convolves the keys that it attends to and counts their distances itself, as if no token were left out",
    ),
}
"""Kinds of decoder layer that cannot run on some positions only, and why."""

_INPUT_PROJECTION = "in_proj"
"""What the input projections of linear attention, Mamba and LFM's convolutions are called, or begin with."""


def undrivable(layer: nn.Module, kind: str | None) -> str | None:
    """Why the running state of a decoder layer cannot be built from some positions only; None where it can."""
    if kind in _OTHER_STATES:
        return _OTHER_STATES[kind]
    if getattr(layer, "ple", None) is not None:
        return "it embeds runs of neighbouring token ids, which change where visual tokens leave"
    for name, module in layer.named_modules() if kind in RUNNING_STATE else ():
        if name.rpartition(".")[2].startswith(_INPUT_PROJECTION) and getattr(module, "bias", None) is not None:
            return f"its {name} adds a bias at padding too, over which the state of shorter rows would run"
    return None


def layer_kinds(text_config: Any) -> list[str | None]:
    """The kind of every decoder layer, as transformers calls them; None where the configuration does not say."""
    kinds, number = getattr(text_config, "layer_types", None) or [], text_config.num_hidden_layers
    return list(kinds) if len(kinds) == number else [None] * number


INDEXERS_BY_KEY = ("Dots3NoteTextIndexer", "MistralLarge4TextIndexer")
"""Indexers that choose key by key among those that the layer's mask lets them see."""

INDEXERS_BY_VISIBLE_BLOCK = ("Qwen4ExpTextQSAIndexer",)
"""Indexers that choose blocks of keys that lie one behind the other among those that the mask lets a query see."""

INDEXERS_BY_BLOCK = ("MiniMaxM3VLIndexer",)
"""Indexers that choose blocks of neighbouring keys."""

INDEXERS_BY_POOL = ("Glm5NextTextIndexer",)
"""Indexers that choose pools of tokens, which they count off from a row's first one."""

DRIVEN_INDEXERS = INDEXERS_BY_KEY + INDEXERS_BY_VISIBLE_BLOCK + INDEXERS_BY_BLOCK + INDEXERS_BY_POOL
"""Indexers of layers that can run on some positions only."""


def indexer_of(attention: nn.Module | None) -> Any:
    """What an attention module chooses its keys with; None for one that attends to all."""
    return getattr(attention, "indexer", None)


def runs_together(attention: nn.Module | None) -> bool:
    """Whether a layer must run on the rows' tokens as they follow each other, all rows at once, padding in front.

    So do layers that carry a running state, and those whose keys are pooled in the order in which they come.
    """
    return attention is None or type(indexer_of(attention)).__name__ in INDEXERS_BY_POOL


def needs_all_tokens(attention: nn.Module | None) -> bool:
    """Whether a layer cannot run on some tokens with the keys of earlier ones at hand: it builds on all of them."""
    return runs_together(attention) or type(indexer_of(attention)).__name__ in INDEXERS_BY_VISIBLE_BLOCK


CACHE_NAMES = ("past_key_values", "cache")
"""What the KV cache is called among a forward call's arguments and results: by transformers before 5.24, and since."""


def cache_among(values: Mapping[str, Any]) -> Any:
    """The KV cache among a forward call's arguments or results by name; None without one."""
    return next((values[name] for name in CACHE_NAMES if values.get(name) is not None), None)


def renamed(values: dict[str, Any], old: str, new: str) -> dict[str, Any]:
    """The same with another key for one of the values, if it is there.

    Example:
        >>> renamed({"cache": 1, "use_cache": True}, "cache", "past_key_values")
        {'past_key_values': 1, 'use_cache': True}
    """
    return {new if name == old else name: value for name, value in values.items()}


def inner_models(model: Any) -> list[Any]:
    """The models that the `generate` of a wrapper calls directly: PEFT's base model, the language model of BLIP-2."""
    base = getattr(model, "get_base_model", None)
    found = [] if base is None or base() is model else [base()]
    return [*found, *(each for each in [language_model_of(found[-1] if found else model)] if each is not None)]


def language_model_of(model: Any) -> Any:
    """The language model that a `generate` of the model's own class hands its inputs to; None for most models."""
    if "generate" not in vars(type(model)):
        return None
    inner = getattr(model, "language_model", None) or getattr(model, "text_model", None)
    return inner if hasattr(inner, "generate") else None
