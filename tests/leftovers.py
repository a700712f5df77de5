"""Whether anything of the engine stays on a model or in transformers after a block."""

from __future__ import annotations

from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dyvte.mllm import MLLM


def pristine(mllm: MLLM) -> bool:
    """Whether no module has another `forward` or `generate`, or a hook, and attention functions are the library's own.

    What transformers leaves itself, once it was asked for maps or states, is not ours.
    """
    overrides, ours = False, False
    for module in mllm.model.modules():
        overrides |= any(name in module.__dict__ for name in ("forward", "generate"))
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        ours |= any(not getattr(hook, "__module__", "").startswith("transformers.") for hook in hooks)
    known = ALL_ATTENTION_FUNCTIONS._global_mapping
    replaced = any(known.get(name) is not each for name, each in ALL_ATTENTION_FUNCTIONS._local_mapping.items())
    return not overrides and not ours and not replaced
