# ruff: noqa: I001  (the methods stand in the order in which tables list them)
"""The public names of `dyvte`, listed once: type checkers read this, and at run time `dyvte/__init__.py` does."""

from dyvte.loading import load as load, wrap as wrap
from dyvte.mllm import MLLM as MLLM
from dyvte.batch import Batch as Batch
from dyvte.errors import ModelError as ModelError, DyvteError as DyvteError, UnsupportedError as UnsupportedError
from dyvte.layout import ROLES as ROLES, TokenLayout as TokenLayout
from dyvte.instrument.attention import AttentionProbe as AttentionProbe, AttentionStats as AttentionStats
from dyvte.instrument.video_frames import frame_numbers as frame_numbers, frame_shares as frame_shares
from dyvte.instrument.sweep import exit_sweep as exit_sweep, ExitSweep as ExitSweep
from dyvte.instrument.causal.knockout import knockout as knockout, Knockout as Knockout
from dyvte.instrument.causal.lens import logit_lens as logit_lens, LogitLens as LogitLens
from dyvte.policies.base import Policy as Policy, PolicyRun as PolicyRun, Prefill as Prefill
from dyvte.policies.attention_policy import AttentionPolicy as AttentionPolicy
from dyvte.policies.scorer import ScorerPolicy as ScorerPolicy
from dyvte.policies.unchanged import Unchanged as Unchanged
from dyvte.policies.exits.fixed_exit import FixedExit as FixedExit
from dyvte.policies.exits.dynamic_exit import DynamicExit as DynamicExit
from dyvte.policies.exits.vtw import VTW as VTW
from dyvte.policies.exits.lens_exit import LensExit as LensExit
from dyvte.policies.exits.todre_exit import ToDREExit as ToDREExit
from dyvte.policies.exits.visipruner import VisiPruner as VisiPruner
from dyvte.policies.pruning.fastv import FastV as FastV
from dyvte.policies.pruning.pyramid_drop import PyramidDrop as PyramidDrop
from dyvte.policies.merging.tome import ToMe as ToMe
from dyvte.policies.decoder.himap import HiMAP as HiMAP
from dyvte.policies.decoder.sgl import SGL as SGL
from dyvte.policies.decoder.sparsevlm import SparseVLM as SparseVLM
from dyvte.policies.decoder.dart import DART as DART
from dyvte.policies.decoder.feather import FEATHER as FEATHER
from dyvte.policies.decoder.vscan import VScanDecoder as VScanDecoder
from dyvte.policies.decoder.aim import AIM as AIM
from dyvte.policies.decoder.yopo import YOPO as YOPO
from dyvte.policies.decoder.topv import TopV as TopV
from dyvte.policies.decoder.autoprune import AutoPrune as AutoPrune
from dyvte.policies.pruning.fitprune import FitPrune as FitPrune
from dyvte.policies.pruning.divprune import DivPrune as DivPrune
from dyvte.policies.vision.fastervlm import FasterVLM as FasterVLM
from dyvte.policies.vision.vtc_cls import VTCCLS as VTCCLS
from dyvte.policies.vision.fopru import FoPru as FoPru
from dyvte.policies.vision.visionzip import VisionZip as VisionZip
from dyvte.policies.vision.vispruner import VisPruner as VisPruner
from dyvte.policies.vision.vscan import VScan as VScan
from dyvte.policies.vision.sparsity_similarity import SparsityMeetsSimilarity as SparsityMeetsSimilarity
from dyvte.policies.pruning.cdpruner import CDPruner as CDPruner
from dyvte.policies.vision.todre import ToDRE as ToDRE
from dyvte.policies.pruning.gprune import GPrune as GPrune
from dyvte.policies.vision.holov import HoloV as HoloV
from dyvte.policies.vision.hired import HiRED as HiRED
from dyvte.policies.vision.prumerge import PruMergePlus as PruMergePlus, PruMerge as PruMerge
from dyvte.policies.video.dycoke import DyCoke as DyCoke
from dyvte.policies.video.prunevid import PruneVid as PruneVid
from dyvte.policies.pruning.drop import (
    RandomDrop as RandomDrop,
    StratifiedDrop as StratifiedDrop,
    UniformDrop as UniformDrop,
)
from dyvte.policies.merging.pooling import AveragePool as AveragePool, DownsampleImage as DownsampleImage
from dyvte.policies.skip_attention import SkipAttention as SkipAttention
from dyvte.policies.compose import Compose as Compose
from dyvte.policies.fastv_dynamic_exit import FastVDynamicExit as FastVDynamicExit
from dyvte.gates import Gates as Gates
from dyvte.policies.exits.dynamic_exit import exit_probabilities as exit_probabilities
from dyvte.cost.exit_flops import exit_flops as exit_flops
from dyvte.cost.flops import FlopCounter as FlopCounter

__version__: str
__all__: list[str]
_PUBLIC: dict[str, str]
