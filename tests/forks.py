"""Small random checkpoints in the layouts of the LLaVA code base and its forks, and a direct computation from them.

What the forks compute is written down here a second time, from their tensors alone, so that a conversion can be
checked against it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from families import BOS, EOS, FIRST_TEXT, HIDDEN, IMAGE_SIZE, LAST_TEXT, PAD, PATCH_SIZE, _tokenizer
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM, SiglipVisionConfig
from transformers import SiglipVisionModel as SiglipTower

VOCABULARY = 110
TOWER_WIDTH = 32
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}
INTERN_VIT = {
    "model_type": "intern_vit_6b",
    "hidden_size": TOWER_WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": IMAGE_SIZE,
    "patch_size": PATCH_SIZE,
    "qkv_bias": False,
    "qk_normalization": True,
    "layer_norm_eps": 1e-6,
    "hidden_act": "gelu",
}
Weights = dict[str, Tensor]


def randomise(weights: Weights, seed: int) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(each.shape, generator=generator) * (1.5 / each.shape[-1] ** 0.5 if each.ndim > 1 else 0.5)
        + (each.ndim == 1)
        for name, each in weights.items()
    }


def language_model() -> Weights:
    return randomise(LlamaForCausalLM(LlamaConfig(**TEXT)).state_dict(), 0)


def tower(kind: str, image_size: int = IMAGE_SIZE) -> tuple[dict[str, Any], Weights]:
    """Config and tensors of a vision tower, named as in its repository."""
    shape = {
        "hidden_size": TOWER_WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": image_size,
        "patch_size": PATCH_SIZE,
    }
    if kind == "clip":
        model = CLIPVisionModel(CLIPVisionConfig(**shape))
    elif kind == "siglip":
        model = SiglipTower(SiglipVisionConfig(**shape))
    else:
        return {**INTERN_VIT, "image_size": image_size}, randomise(_intern_vit_shapes(), 1)
    weights = {f"vision_model.{name}": each for name, each in model.state_dict().items()}
    return {"model_type": f"{kind}_vision_model", **shape}, randomise(weights, 1)


def _intern_vit_shapes() -> Weights:
    width, inner = TOWER_WIDTH, INTERN_VIT["intermediate_size"]
    shapes = {
        "embeddings.class_embedding": (1, 1, width),
        "embeddings.position_embedding": (1, (IMAGE_SIZE // PATCH_SIZE) ** 2 + 1, width),
        "embeddings.patch_embedding.weight": (width, 3, PATCH_SIZE, PATCH_SIZE),
        "embeddings.patch_embedding.bias": (width,),
    }
    for layer in range(INTERN_VIT["num_hidden_layers"]):
        prefix = f"encoder.layers.{layer}."
        shapes |= {
            f"{prefix}{name}": size
            for name, size in {
                "attn.qkv.weight": (3 * width, width),
                "attn.q_norm.weight": (width,),
                "attn.k_norm.weight": (width,),
                "attn.proj.weight": (width, width),
                "attn.proj.bias": (width,),
                "mlp.fc1.weight": (inner, width),
                "mlp.fc1.bias": (inner,),
                "mlp.fc2.weight": (width, inner),
                "mlp.fc2.bias": (width,),
                "norm1.weight": (width,),
                "norm2.weight": (width,),
                "ls1": (width,),
                "ls2": (width,),
            }.items()
        }
    return {name: torch.zeros(size) for name, size in shapes.items()}


def projector(kind: str) -> Weights:
    layers: dict[str, nn.Module] = {
        "linear": {"": nn.Linear(TOWER_WIDTH, HIDDEN)},
        "mlp2x_gelu": {"0.": nn.Linear(TOWER_WIDTH, HIDDEN), "2.": nn.Linear(HIDDEN, HIDDEN)},
        "mlp_downsample": {
            "1.": nn.LayerNorm(4 * TOWER_WIDTH),
            "2.": nn.Linear(4 * TOWER_WIDTH, HIDDEN),
            "4.": nn.Linear(HIDDEN, HIDDEN),
        },
    }[kind]
    return randomise(
        {f"{at}{name}": each for at, layer in layers.items() for name, each in layer.state_dict().items()}, 2
    )


# --------------------------------------------------------------------------- layouts


def write_tokenizer(folder: Path) -> None:
    """A word-level tokenizer without an image token, as the forks have it."""
    tokenizer = _tokenizer(
        {},
    )
    vocabulary = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary["model"]["vocab"] = {
        word: index for word, index in vocabulary["model"]["vocab"].items() if index < VOCABULARY
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(vocabulary))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "pad_token": "<pad>",
                "bos_token": "<s>",
                "eos_token": "</s>",
                "unk_token": "<unk>",
            }
        )
    )


def write_weights(folder: Path, weights: Weights, kind: str, shards: int = 1) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(weights)
    index: dict[str, str] = {}
    for number in range(shards):
        part = {name: weights[name] for name in names[number::shards]}
        stem = f"-{number + 1:05d}-of-{shards:05d}" if shards > 1 else ""
        if kind == "bin":
            file = f"pytorch_model{stem}.bin"
            torch.save(part, folder / file)
        else:
            file = f"model{stem}.safetensors"
            save_file(part, folder / file)
        index |= dict.fromkeys(part, file)
    if shards > 1:
        name = "pytorch_model.bin.index.json" if kind == "bin" else "model.safetensors.index.json"
        (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": index}))


class Fork:
    """A checkpoint on disk, and what its code base would compute from its tensors."""

    def __init__(
        self,
        folder: Path,
        tower_kind: str,
        projector_kind: str,
        layout: str,
        file_kind: str = "bin",
        image_size: int = IMAGE_SIZE,
        **config: Any,
    ) -> None:
        self.folder, self.tower_kind, self.projector_kind = folder, tower_kind, projector_kind
        self.text = language_model()
        self.tower_config, self.tower = tower(tower_kind, image_size)
        self.projector = projector(projector_kind)
        self.select_layer = -2 if tower_kind != "intern_vit" else -3
        self.config = {
            "mm_vision_select_layer": self.select_layer,
            "mm_vision_select_feature": "cls_patch" if tower_kind == "siglip" else "patch",
            "mm_use_im_start_end": False,
            "image_aspect_ratio": "pad",
            **config,
        }
        getattr(self, f"_write_{layout}")(file_kind)

    def _write_llava(self, file_kind: str) -> None:
        """One folder, tower apart (LLaVA-1.5)."""
        self._write_joint(file_kind, {})

    def _write_llava_with_tower(self, file_kind: str) -> None:
        """One folder, tower inside (InternVL-Chat)."""
        self._write_joint(
            file_kind, {f"model.vision_tower.vision_tower.{name}": each for name, each in self.tower.items()}
        )

    def _write_joint(self, file_kind: str, tower_inside: Weights) -> None:
        tower_folder = self.folder / "tower"
        write_weights(tower_folder, self.tower, file_kind)
        (tower_folder / "config.json").write_text(json.dumps(self.tower_config))
        config = {
            **TEXT,
            **self.config,
            "model_type": "llava",
            "architectures": ["LlavaLlamaForCausalLM"],
            "mm_projector_type": self.projector_kind,
            "mm_vision_tower": "tower",
        }
        at = "model.mm_projector."
        weights = {**self.text, **{at + name: each for name, each in self.projector.items()}, **tower_inside}
        write_weights(self.folder, weights, file_kind, shards=3)
        (self.folder / "config.json").write_text(json.dumps(config))
        write_tokenizer(self.folder)

    def _write_vila(self, file_kind: str) -> None:
        """Three folders (VILA 1.5)."""
        write_weights(self.folder / "llm", self.text, file_kind, shards=2)
        write_weights(self.folder / "vision_tower", self.tower, file_kind)
        write_weights(
            self.folder / "mm_projector", {f"layers.{name}": each for name, each in self.projector.items()}, file_kind
        )
        configs = {
            ".": {**self.config, "model_type": "llava_llama", "llm_cfg": "llm"},
            "llm": {**TEXT, "model_type": "llama", "architectures": ["LlamaForCausalLM"]},
            "vision_tower": self.tower_config,
            "mm_projector": {"model_type": "v2l_projector", "mm_projector_type": self.projector_kind},
        }
        for name, config in configs.items():
            (self.folder / name / "config.json").write_text(json.dumps(config))
        write_tokenizer(self.folder / "llm")

    # -------------------------------------------------------------- what it computes

    @torch.no_grad()
    def visual_tokens(self, pixels: Tensor) -> Tensor:
        """[images, 3, height, width] -> [images, tokens, hidden size]."""
        features = self._tower_states(pixels)[self.select_layer]
        if self.config["mm_vision_select_feature"] == "patch":
            features = features[:, 1:]
        weights = self.projector
        if self.projector_kind == "linear":
            return features @ weights["weight"].T + weights["bias"]
        first, second = "0", "2"
        if self.projector_kind == "mlp_downsample":
            features = self._joined(features)
            features = nn.functional.layer_norm(features, features.shape[-1:], weights["1.weight"], weights["1.bias"])
            first, second = "2", "4"
        hidden = nn.functional.gelu(features @ weights[f"{first}.weight"].T + weights[f"{first}.bias"])
        return hidden @ weights[f"{second}.weight"].T + weights[f"{second}.bias"]

    @staticmethod
    def _joined(features: Tensor) -> Tensor:
        images, count, size = features.shape
        side = int(count**0.5)
        rows: list[Tensor] = []
        for column in range(0, side, 2):
            for row in range(0, side, 2):
                corners = [(row, column), (row, column + 1), (row + 1, column), (row + 1, column + 1)]
                parts = [
                    features[:, r * side + c] if r < side and c < side else torch.zeros(images, size)
                    for r, c in corners
                ]
                rows.append(torch.cat(parts, dim=-1))
        return torch.stack(rows, dim=1)

    def _tower_states(self, pixels: Tensor) -> list[Tensor]:
        if self.tower_kind == "intern_vit":
            return self._intern_vit_states(pixels)
        shape = {key: value for key, value in self.tower_config.items() if key != "model_type"}
        model: Any = (
            CLIPVisionModel(CLIPVisionConfig(**shape))
            if self.tower_kind == "clip"
            else SiglipTower(SiglipVisionConfig(**shape))
        )
        model.load_state_dict({name.removeprefix("vision_model."): each for name, each in self.tower.items()})
        return list(model.eval()(pixels, output_hidden_states=True).hidden_states)

    def _intern_vit_states(self, pixels: Tensor) -> list[Tensor]:
        weights, heads = self.tower, INTERN_VIT["num_attention_heads"]

        def rms(states: Tensor, weight: Tensor) -> Tensor:
            return weight * states * (states.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()

        patches = nn.functional.conv2d(
            pixels,
            weights["embeddings.patch_embedding.weight"],
            weights["embeddings.patch_embedding.bias"],
            stride=PATCH_SIZE,
        )
        patches = patches.flatten(2).transpose(1, 2)
        states = torch.cat([weights["embeddings.class_embedding"].expand(len(patches), 1, -1), patches], dim=1)
        states = states + weights["embeddings.position_embedding"]
        seen = [states]
        for layer in range(INTERN_VIT["num_hidden_layers"]):
            at = {
                name.removeprefix(f"encoder.layers.{layer}."): each
                for name, each in weights.items()
                if name.startswith(f"encoder.layers.{layer}.")
            }
            query, key, value = (rms(states, at["norm1.weight"]) @ at["attn.qkv.weight"].T).chunk(3, dim=-1)
            query, key = rms(query, at["attn.q_norm.weight"]), rms(key, at["attn.k_norm.weight"])
            query, key, value = (each.unflatten(-1, (heads, -1)).transpose(1, 2) for each in (query, key, value))
            scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
            mixed = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
            states = states + at["ls1"] * (mixed @ at["attn.proj.weight"].T + at["attn.proj.bias"])
            inner = rms(states, at["norm2.weight"]) @ at["mlp.fc1.weight"].T + at["mlp.fc1.bias"]
            states = states + at["ls2"] * (nn.functional.gelu(inner) @ at["mlp.fc2.weight"].T + at["mlp.fc2.bias"])
            seen.append(states)
        return seen

    @torch.no_grad()
    def logits(self, ids: list[int], pixels: Tensor) -> Tensor:
        """Logits [positions, vocabulary] of a prompt in which -200 stands for the image."""
        model = LlamaForCausalLM(LlamaConfig(**TEXT)).eval()
        model.load_state_dict(self.text)
        at = ids.index(-200)
        embed = model.get_input_embeddings()
        parts = [embed(torch.tensor(ids[:at])), self.visual_tokens(pixels)[0], embed(torch.tensor(ids[at + 1 :]))]
        return model(inputs_embeds=torch.cat(parts)[None]).logits[0]


def random_ids(seed: int, count: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(FIRST_TEXT, LAST_TEXT + 1, (count,), generator=generator).tolist()
