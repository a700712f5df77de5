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
    "DyvteError": "dyvte.errors",
    "UnsupportedError": "dyvte.errors",
    "ROLES": "dyvte.layout",
    "TokenLayout": "dyvte.layout",
    "AttentionProbe": "dyvte.instrument.attention",
    "AttentionStats": "dyvte.instrument.attention",
    "frame_numbers": "dyvte.instrument.video_frames",
    "frame_shares": "dyvte.instrument.video_frames",
    "exit_sweep": "dyvte.instrument.sweep",
    "ExitSweep": "dyvte.instrument.sweep",
    "knockout": "dyvte.instrument.causal.knockout",
    "Knockout": "dyvte.instrument.causal.knockout",
    "logit_lens": "dyvte.instrument.causal.lens",
    "LogitLens": "dyvte.instrument.causal.lens",
    "Policy": "dyvte.policies.base",
    "PolicyRun": "dyvte.policies.base",
    "Prefill": "dyvte.policies.base",
    "AttentionPolicy": "dyvte.policies.attention_policy",
    "ScorerPolicy": "dyvte.policies.scorer",
    "Unchanged": "dyvte.policies.unchanged",
    "FixedExit": "dyvte.policies.exits.fixed_exit",
    "DynamicExit": "dyvte.policies.exits.dynamic_exit",
    "VTW": "dyvte.policies.exits.vtw",
    "LensExit": "dyvte.policies.exits.lens_exit",
    "ToDREExit": "dyvte.policies.exits.todre_exit",
    "VisiPruner": "dyvte.policies.exits.visipruner",
    "FastV": "dyvte.policies.pruning.fastv",
    "PyramidDrop": "dyvte.policies.pruning.pyramid_drop",
    "ToMe": "dyvte.policies.merging.tome",
    "HiMAP": "dyvte.policies.decoder.himap",
    "SGL": "dyvte.policies.decoder.sgl",
    "SparseVLM": "dyvte.policies.decoder.sparsevlm",
    "DART": "dyvte.policies.decoder.dart",
    "FEATHER": "dyvte.policies.decoder.feather",
    "VScanDecoder": "dyvte.policies.decoder.vscan",
    "AIM": "dyvte.policies.decoder.aim",
    "YOPO": "dyvte.policies.decoder.yopo",
    "TopV": "dyvte.policies.decoder.topv",
    "AutoPrune": "dyvte.policies.decoder.autoprune",
    "FitPrune": "dyvte.policies.pruning.fitprune",
    "DivPrune": "dyvte.policies.pruning.divprune",
    "FasterVLM": "dyvte.policies.vision.fastervlm",
    "VTCCLS": "dyvte.policies.vision.vtc_cls",
    "FoPru": "dyvte.policies.vision.fopru",
    "VisionZip": "dyvte.policies.vision.visionzip",
    "VisPruner": "dyvte.policies.vision.vispruner",
    "VScan": "dyvte.policies.vision.vscan",
    "SparsityMeetsSimilarity": "dyvte.policies.vision.sparsity_similarity",
    "CDPruner": "dyvte.policies.pruning.cdpruner",
    "ToDRE": "dyvte.policies.vision.todre",
    "GPrune": "dyvte.policies.pruning.gprune",
    "HoloV": "dyvte.policies.vision.holov",
    "HiRED": "dyvte.policies.vision.hired",
    "PruMergePlus": "dyvte.policies.vision.prumerge",
    "PruMerge": "dyvte.policies.vision.prumerge",
    "DyCoke": "dyvte.policies.video.dycoke",
    "PruneVid": "dyvte.policies.video.prunevid",
    "RandomDrop": "dyvte.policies.pruning.drop",
    "StratifiedDrop": "dyvte.policies.pruning.drop",
    "UniformDrop": "dyvte.policies.pruning.drop",
    "AveragePool": "dyvte.policies.merging.pooling",
    "DownsampleImage": "dyvte.policies.merging.pooling",
    "SkipAttention": "dyvte.policies.skip_attention",
    "Compose": "dyvte.policies.compose",
    "FastVDynamicExit": "dyvte.policies.fastv_dynamic_exit",
    "Gates": "dyvte.gates",
    "exit_probabilities": "dyvte.policies.exits.dynamic_exit",
    "exit_flops": "dyvte.cost.exit_flops",
    "FlopCounter": "dyvte.cost.flops",
}

__all__ = ["__version__", *_PUBLIC]

if TYPE_CHECKING:  # what a type checker sees; a test holds it to the names above
    from dyvte.batch import Batch as Batch
    from dyvte.cost.exit_flops import exit_flops as exit_flops
    from dyvte.cost.flops import FlopCounter as FlopCounter
    from dyvte.errors import DyvteError as DyvteError
    from dyvte.errors import ModelError as ModelError
    from dyvte.errors import UnsupportedError as UnsupportedError
    from dyvte.gates import Gates as Gates
    from dyvte.instrument.attention import AttentionProbe as AttentionProbe
    from dyvte.instrument.attention import AttentionStats as AttentionStats
    from dyvte.instrument.causal.knockout import Knockout as Knockout
    from dyvte.instrument.causal.knockout import knockout as knockout
    from dyvte.instrument.causal.lens import LogitLens as LogitLens
    from dyvte.instrument.causal.lens import logit_lens as logit_lens
    from dyvte.instrument.sweep import ExitSweep as ExitSweep
    from dyvte.instrument.sweep import exit_sweep as exit_sweep
    from dyvte.instrument.video_frames import frame_numbers as frame_numbers
    from dyvte.instrument.video_frames import frame_shares as frame_shares
    from dyvte.layout import ROLES as ROLES
    from dyvte.layout import TokenLayout as TokenLayout
    from dyvte.loading import load as load
    from dyvte.loading import wrap as wrap
    from dyvte.mllm import MLLM as MLLM
    from dyvte.policies.attention_policy import AttentionPolicy as AttentionPolicy
    from dyvte.policies.base import Policy as Policy
    from dyvte.policies.base import PolicyRun as PolicyRun
    from dyvte.policies.base import Prefill as Prefill
    from dyvte.policies.compose import Compose as Compose
    from dyvte.policies.decoder.aim import AIM as AIM
    from dyvte.policies.decoder.autoprune import AutoPrune as AutoPrune
    from dyvte.policies.decoder.dart import DART as DART
    from dyvte.policies.decoder.feather import FEATHER as FEATHER
    from dyvte.policies.decoder.himap import HiMAP as HiMAP
    from dyvte.policies.decoder.sgl import SGL as SGL
    from dyvte.policies.decoder.sparsevlm import SparseVLM as SparseVLM
    from dyvte.policies.decoder.topv import TopV as TopV
    from dyvte.policies.decoder.vscan import VScanDecoder as VScanDecoder
    from dyvte.policies.decoder.yopo import YOPO as YOPO
    from dyvte.policies.exits.dynamic_exit import DynamicExit as DynamicExit
    from dyvte.policies.exits.dynamic_exit import exit_probabilities as exit_probabilities
    from dyvte.policies.exits.fixed_exit import FixedExit as FixedExit
    from dyvte.policies.exits.lens_exit import LensExit as LensExit
    from dyvte.policies.exits.todre_exit import ToDREExit as ToDREExit
    from dyvte.policies.exits.visipruner import VisiPruner as VisiPruner
    from dyvte.policies.exits.vtw import VTW as VTW
    from dyvte.policies.fastv_dynamic_exit import FastVDynamicExit as FastVDynamicExit
    from dyvte.policies.merging.pooling import AveragePool as AveragePool
    from dyvte.policies.merging.pooling import DownsampleImage as DownsampleImage
    from dyvte.policies.merging.tome import ToMe as ToMe
    from dyvte.policies.pruning.cdpruner import CDPruner as CDPruner
    from dyvte.policies.pruning.divprune import DivPrune as DivPrune
    from dyvte.policies.pruning.drop import RandomDrop as RandomDrop
    from dyvte.policies.pruning.drop import StratifiedDrop as StratifiedDrop
    from dyvte.policies.pruning.drop import UniformDrop as UniformDrop
    from dyvte.policies.pruning.fastv import FastV as FastV
    from dyvte.policies.pruning.fitprune import FitPrune as FitPrune
    from dyvte.policies.pruning.gprune import GPrune as GPrune
    from dyvte.policies.pruning.pyramid_drop import PyramidDrop as PyramidDrop
    from dyvte.policies.scorer import ScorerPolicy as ScorerPolicy
    from dyvte.policies.skip_attention import SkipAttention as SkipAttention
    from dyvte.policies.unchanged import Unchanged as Unchanged
    from dyvte.policies.video.dycoke import DyCoke as DyCoke
    from dyvte.policies.video.prunevid import PruneVid as PruneVid
    from dyvte.policies.vision.fastervlm import FasterVLM as FasterVLM
    from dyvte.policies.vision.fopru import FoPru as FoPru
    from dyvte.policies.vision.hired import HiRED as HiRED
    from dyvte.policies.vision.holov import HoloV as HoloV
    from dyvte.policies.vision.prumerge import PruMerge as PruMerge
    from dyvte.policies.vision.prumerge import PruMergePlus as PruMergePlus
    from dyvte.policies.vision.sparsity_similarity import SparsityMeetsSimilarity as SparsityMeetsSimilarity
    from dyvte.policies.vision.todre import ToDRE as ToDRE
    from dyvte.policies.vision.visionzip import VisionZip as VisionZip
    from dyvte.policies.vision.vispruner import VisPruner as VisPruner
    from dyvte.policies.vision.vscan import VScan as VScan
    from dyvte.policies.vision.vtc_cls import VTCCLS as VTCCLS


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'dyvte' has no attribute {name!r}")
    value = getattr(import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
