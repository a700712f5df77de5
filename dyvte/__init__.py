"""Look inside multimodal LLMs and skip the visual tokens that they no longer use.

The names below are imported when they are first used, so `import dyvte` itself costs nothing.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from dyvte.version import __version__

# Threads of OpenMP that wait shall sleep, not spin: beside a busy process spinning makes commands several times slower.
# It has to be set before torch starts; a value of your own stays.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

_PUBLIC = {
    "load": "dyvte.loading",
    "wrap": "dyvte.loading",
    "MLLM": "dyvte.mllm",
    "Batch": "dyvte.batch",
    "ModelError": "dyvte.errors",
    "ROLES": "dyvte.layout",
    "TokenLayout": "dyvte.layout",
    "AttentionProbe": "dyvte.instrument.attention",
    "AttentionStats": "dyvte.instrument.attention",
    "exit_sweep": "dyvte.instrument.sweep",
    "knockout": "dyvte.instrument.causal.knockout",
    "Knockout": "dyvte.instrument.causal.knockout",
    "logit_lens": "dyvte.instrument.causal.lens",
    "LogitLens": "dyvte.instrument.causal.lens",
    "Policy": "dyvte.policies.base",
    "FixedExit": "dyvte.policies.exits.fixed_exit",
    "DynamicExit": "dyvte.policies.exits.dynamic_exit",
    "VTW": "dyvte.policies.exits.vtw",
    "FastV": "dyvte.policies.pruning.fastv",
    "PyramidDrop": "dyvte.policies.pruning.pyramid_drop",
    "ToMe": "dyvte.policies.merging.tome",
    "FitPrune": "dyvte.policies.pruning.fitprune",
    "DivPrune": "dyvte.policies.pruning.divprune",
    "RandomDrop": "dyvte.policies.pruning.drop",
    "UniformDrop": "dyvte.policies.pruning.drop",
    "AveragePool": "dyvte.policies.merging.pooling",
    "DownsampleImage": "dyvte.policies.merging.pooling",
    "SkipAttention": "dyvte.policies.skip_attention",
    "Compose": "dyvte.policies.compose",
    "Gates": "dyvte.gates",
}

__all__ = ["__version__", *_PUBLIC]

if TYPE_CHECKING:
    from dyvte.batch import Batch as Batch
    from dyvte.layout import ROLES as ROLES
    from dyvte.layout import TokenLayout as TokenLayout
    from dyvte.loading import load as load
    from dyvte.loading import wrap as wrap
    from dyvte.mllm import MLLM as MLLM


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'dyvte' has no attribute {name!r}")
    value = getattr(import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
