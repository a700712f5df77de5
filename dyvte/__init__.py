"""Look inside multimodal LLMs and skip the visual tokens that they no longer use.

The names below are imported when they are first used, so `import dyvte` itself costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "load": "dyvte.mllm",
    "wrap": "dyvte.mllm",
    "MLLM": "dyvte.mllm",
    "Batch": "dyvte.mllm",
    "ModelError": "dyvte.errors",
    "ROLES": "dyvte.layout",
    "TokenLayout": "dyvte.layout",
    "AttentionProbe": "dyvte.instrument.attention",
    "AttentionStats": "dyvte.instrument.attention",
    "exit_sweep": "dyvte.instrument.sweep",
    "Policy": "dyvte.policies.base",
    "FixedExit": "dyvte.policies.fixed_exit",
    "DynamicExit": "dyvte.policies.dynamic_exit",
    "VTW": "dyvte.policies.vtw",
    "FastV": "dyvte.policies.fastv",
    "PyramidDrop": "dyvte.policies.pyramid_drop",
    "ToMe": "dyvte.policies.tome",
    "FitPrune": "dyvte.policies.fitprune",
    "DivPrune": "dyvte.policies.divprune",
    "RandomDrop": "dyvte.policies.drop",
    "UniformDrop": "dyvte.policies.drop",
    "AveragePool": "dyvte.policies.pooling",
    "DownsampleImage": "dyvte.policies.pooling",
    "SkipAttention": "dyvte.policies.skip_attention",
    "Compose": "dyvte.policies.compose",
    "Gates": "dyvte.gates",
}

__all__ = ["__version__", *_PUBLIC]

if TYPE_CHECKING:
    from dyvte.layout import ROLES as ROLES
    from dyvte.layout import TokenLayout as TokenLayout
    from dyvte.mllm import MLLM as MLLM
    from dyvte.mllm import Batch as Batch
    from dyvte.mllm import load as load
    from dyvte.mllm import wrap as wrap


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'dyvte' has no attribute {name!r}")
    value = getattr(import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
