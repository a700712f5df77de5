"""What a checkpoint of the LLaVA code base consists of: language model, vision tower, projector, and its settings.

Three layouts are known. LLaVA-1.5, VILA-1.0 and InternVL-Chat keep everything in one folder, with tensors
`model.layers.*`, `model.mm_projector.*` and, in some, `model.vision_tower.*`. VILA from 1.5 on has the folders `llm/`,
`vision_tower/` and `mm_projector/`, each with its own config.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING

from dyvte.conversion.weights import StoredTensor, weight_files
from dyvte.errors import ModelError
from dyvte.stored_files import read_json

PROJECTORS = ("linear", "mlp2x_gelu", "mlp_downsample")
EXPORT_HINT = "export its visual tokens instead (docs/how_to_llava_forks.md)"

_TOWER_PREFIXES = ("model.vision_tower.vision_tower.", "model.vision_tower.", "vision_tower.vision_tower.")
_PROJECTOR_PREFIXES = ("model.mm_projector.", "mm_projector.", "model.multi_modal_projector.")


@dataclass
class Source:
    """A checkpoint, read but not loaded. Tensors are keyed by their name inside of their part.

    Attributes:
        folder: of the checkpoint.
        config: its `config.json`.
        text_config: of the language model, as transformers knows it.
        text: `model.layers.*`, `model.embed_tokens.weight`, `model.norm.weight`, `lm_head.weight`.
        tower_config: of the vision tower as its own `config.json` has it; empty where no tower is read.
        tower: `embeddings.*`, `encoder.layers.*`, ...
        tower_folder: where the vision tower's config came from.
        projector_type: one of `PROJECTORS`; empty where no tower is read.
        projector: `0.weight`, `2.bias`, ...; `weight` and `bias` of a single layer.
        tokenizer_folder: where the tokenizer is.
    """

    folder: Path
    config: dict[str, Any]
    text_config: Any
    tokenizer_folder: Path
    text: dict[str, StoredTensor] = field(default_factory=dict)
    tower_config: dict[str, Any] = field(default_factory=dict)
    tower: dict[str, StoredTensor] = field(default_factory=dict)
    tower_folder: Path | None = None
    projector_type: str = ""
    projector: dict[str, StoredTensor] = field(default_factory=dict)

    @property
    def keeps_class_token(self) -> bool:
        """Whether all tokens of the tower are used, its class token too if there is one."""
        return self.config.get("mm_vision_select_feature", "patch") == "cls_patch"


def checkpoint_folder(name: str | Path, revision: str | None = None, token: str | bool | None = None) -> Path:
    """The folder of a checkpoint: itself, or a Hub id downloaded to the cache (safetensors where there are any)."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError

    try:
        settings: dict[str, Any] = {"revision": revision, "token": token}
        found = Path(snapshot_download(str(name), allow_patterns=["*.json", "*.model", "*.safetensors"], **settings))
        if not list(found.rglob("*.safetensors")):
            found = Path(snapshot_download(str(name), allow_patterns=["*.json", "*.model", "*.bin"], **settings))
    except GatedRepoError as error:
        raise ModelError(f"{name} is gated; accept its terms on its Hub page, then run `hf auth login`") from error
    except Exception as error:
        raise ModelError(
            f"{name} is neither a folder nor can it be downloaded ({type(error).__name__}); give a local folder, or "
            f"run `hf download {name}` where there is a network"
        ) from error
    return found


def read_source(folder: Path, vision_tower: str | None = None) -> Source:
    """Find the parts of a checkpoint and check that they can be converted.

    The vision tower, a folder or Hub id, is given where the checkpoint does not hold it (LLaVA-1.5 does not) and its
    config does not name it.
    """
    source = read_language_model(folder)
    config = source.config
    _refuse_what_has_no_conversion(folder, config)
    if (folder / "llm").is_dir():
        source.tower_folder = folder / "vision_tower"
        source.tower = _tensors(source.tower_folder)
        projector_config = _read_json(folder / "mm_projector" / "config.json")
        source.projector = _tensors(folder / "mm_projector")
        source.projector_type = str(projector_config.get("mm_projector_type", ""))
    else:
        everything = _tensors(folder)
        source.projector = _part(everything, _PROJECTOR_PREFIXES)
        source.projector_type = str(config.get("mm_projector_type", "linear"))
        source.tower_folder = _tower_folder(folder, config, vision_tower)
        source.tower = _part(everything, _TOWER_PREFIXES) or _tensors(source.tower_folder)
    source.tower_config = _read_json(source.tower_folder / "config.json")
    source.tower_config = source.tower_config.get("vision_config") or source.tower_config
    source.tower = {name.removeprefix("vision_model."): each for name, each in source.tower.items()}
    source.projector = {name.removeprefix("layers."): each for name, each in source.projector.items()}
    if source.projector_type not in PROJECTORS:
        raise ModelError(
            f"{folder}: projector {source.projector_type!r} is not one of {', '.join(PROJECTORS)}; {EXPORT_HINT}"
        )
    if not source.projector:
        raise ModelError(f"{folder}: holds no projector (tensors model.mm_projector.*): it is not a LLaVA checkpoint")
    return source


def read_language_model(folder: Path) -> Source:
    """The language model of a checkpoint alone."""
    if not folder.is_dir():
        raise ModelError(f"{folder} is not a folder: give the folder of a downloaded checkpoint")
    config = _read_json(folder / "config.json")
    if "vision_config" in config and "text_config" in config:
        raise ModelError(
            f"{folder} is in the format of transformers already (model type {config.get('model_type')!r}): "
            f"use it as it is with model.path={folder}"
        )
    if "vision_config" in config and "llm_config" in config:
        raise ModelError(
            f"{folder} is not of the LLaVA code base but InternVL's own format: take the repository of the same name "
            "ending in -hf, which transformers reads"
        )
    parts = (folder / "llm").is_dir()
    text_folder = folder / "llm" if parts else folder
    text = _tensors(text_folder)
    return Source(
        folder=folder,
        config=config,
        text_config=text_config_of(_read_json(text_folder / "config.json"), text_folder),
        tokenizer_folder=text_folder,
        text={
            name: each
            for name, each in text.items()
            if name.startswith(("model.layers.", "model.embed_tokens.", "model.norm.", "lm_head."))
            and not name.endswith("rotary_emb.inv_freq")  # computed, not learned; old checkpoints saved it
        },
    )


def _refuse_what_has_no_conversion(folder: Path, config: dict[str, Any]) -> None:
    ratio = str(config.get("image_aspect_ratio") or "")
    if "anyres" in ratio or "unpad" in str(config.get("mm_patch_merge_type") or ""):
        raise ModelError(
            f"{folder}: a LLaVA-NeXT checkpoint (image_aspect_ratio={ratio!r}); its conversion is on the Hub as "
            "llava-hf/llava-v1.6-* (model=llava_next7b)"
        )
    if "dynamic" in ratio or config.get("s2") or config.get("dynamic_s2"):
        raise ModelError(f"{folder}: VILA's multi-scale images (S2, dynamic) have no conversion; {EXPORT_HINT}")
    tower = config.get("mm_vision_tower")
    if isinstance(tower, list) or ";" in str(tower):
        raise ModelError(f"{folder}: several vision towers ({tower}); {EXPORT_HINT}")


def text_config_of(config: dict[str, Any], folder: Path) -> Any:
    """Config of the language model, as transformers knows it, from the `config.json` of a checkpoint."""
    named = " ".join([str(config.get("model_type")), *map(str, config.get("architectures") or [])]).lower()
    for word, model_type in (("llama", "llama"), ("mistral", "mistral"), ("qwen2", "qwen2"), ("qwen", "qwen2")):
        if word in named:
            known = set(CONFIG_MAPPING[model_type]().to_dict()) | {"rope_theta", "rope_scaling", "sliding_window"}
            ignored = {"architectures", "model_type", "transformers_version", "_name_or_path", "dtype"}
            settings = {key: value for key, value in config.items() if key in known - ignored}
            return CONFIG_MAPPING[model_type](**settings)
    raise ModelError(f"{folder}: language model {named.strip()!r} is neither Llama, Mistral nor Qwen2; {EXPORT_HINT}")


def _tower_folder(folder: Path, config: dict[str, Any], given: str | None) -> Path:
    name = given or config.get("mm_vision_tower") or config.get("vision_tower")
    if not name:
        raise ModelError(f"{folder}: the config names no vision tower; give vision_tower=FOLDER or a Hub id")
    if not given:  # by a file that somebody else may have written
        leads_out = Path(str(name)).is_absolute() or str(name).startswith("~") or ".." in Path(str(name)).parts
        if leads_out or not isinstance(name, str) or (Path(name).is_dir() and not (folder / name).is_dir()):
            raise ModelError(
                f"{folder / 'config.json'} names a vision tower outside of its folder, {name!r}: say that it may be "
                f"read with vision_tower={name}"
            )
        if (folder / name).is_dir():
            return folder / name
    try:
        return checkpoint_folder(name)
    except ModelError as error:
        raise ModelError(f"vision tower of {folder}: {error} (vision_tower=...)") from error


def tower_image_size(source: Source, patch_size: int) -> int:
    """Side of the images that the tower's position embeddings are for, in pixels."""
    table = source.tower.get("embeddings.position_embedding.weight") or source.tower.get(
        "embeddings.position_embedding"
    )
    if table is None:
        raise ModelError(f"{source.tower_folder}: holds no position embeddings of a vision tower")
    return math.isqrt(table.shape[-2]) * patch_size  # one more for a class token does not change the root


def _tensors(folder: Path) -> dict[str, StoredTensor]:
    if not folder.is_dir():
        raise ModelError(f"{folder} is missing; download the checkpoint again")
    found: dict[str, StoredTensor] = {}
    for file in weight_files(folder):
        found |= file.tensors()
        file.close()
    return found


def _part(tensors: dict[str, StoredTensor], prefixes: tuple[str, ...]) -> dict[str, StoredTensor]:
    for prefix in prefixes:
        found = {name[len(prefix) :]: each for name, each in tensors.items() if name.startswith(prefix)}
        if found:
            return found
    return {}


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ModelError(f"{path} is missing: not a checkpoint of the LLaVA code base")
    return read_json(path)
