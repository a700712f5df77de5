"""Gates that decide, layer by layer, whether the visual tokens are still needed (DyVTE, arXiv 2411.19628)."""

from dyvte.gates.module import Gates

__all__ = ["Gates"]
