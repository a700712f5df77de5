"""How like a text every patch is, by the text tower of the CLIP model that a vision tower is from."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPModel

from dyvte.errors import ModelError, UnsupportedError


class TextSimilarity:
    """Text tower of a CLIP model, and the part of its vision tower that an MLLM leaves out.

    Raises:
        ModelError: there is no CLIP model with a tokenizer.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            self.model: Any = CLIPModel.from_pretrained(path).eval()
            self.tokenizer: Any = AutoTokenizer.from_pretrained(path)
        except (OSError, ValueError) as error:
            raise ModelError(
                f"text_tower={path!r}: no CLIP model with a tokenizer can be loaded from there ({error})"
            ) from error

    @classmethod
    @lru_cache(maxsize=1)
    def load(cls, path: str) -> TextSimilarity:
        """The model at a Hub id or folder; the last one loaded is kept."""
        return cls(path)

    @torch.no_grad()
    def __call__(self, features: Tensor, text: str) -> Tensor:
        """Cosine [n, pieces] of patches and a text, cut into pieces that the text tower takes.

        Args:
            features: [n, c] states of the patches in the encoder layer that LLaVA shows its projector.
            text: of any length.

        Raises:
            UnsupportedError: the features are not of this model's vision tower.
        """
        vision, width = self.model.vision_model, self.model.visual_projection.in_features
        if features.shape[1] != width:
            raise UnsupportedError(
                f"text_tower={self.path!r} is of a CLIP {width} wide, the model's vision tower is {features.shape[1]} "
                "wide; give the CLIP model that the vision tower is from"
            )
        self.model.to(features.device)
        patches = self.model.visual_projection(vision.post_layernorm(features.to(self.model.dtype)))
        pieces = [
            self.model.text_projection(self.model.text_model(input_ids=ids.to(features.device)).pooler_output)
            for ids in self._pieces(text)
        ]
        return nn.functional.normalize(patches, dim=-1) @ nn.functional.normalize(torch.cat(pieces), dim=-1).T

    def _pieces(self, text: str) -> list[Tensor]:
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        config = self.model.config.text_config
        room = config.max_position_embeddings - 2
        parts = [ids[start : start + room] for start in range(0, max(len(ids), 1), room)]
        return [torch.tensor([[self.tokenizer.bos_token_id, *part, self.tokenizer.eos_token_id]]) for part in parts]
