"""Put `llava_smol` together: `python -m dyvte.testbed.smol.assemble` (`make smol`, `dyvte smol`).

The repository ships what was trained: a low-rank adapter (in the format of peft) and the projector. The vision tower is
that of the small testbed. The language model is fetched once, its hash is checked, the adapter is merged into it, and
the whole is written as an ordinary LLaVA folder that `dyvte.load("llava_smol")` reads.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM, LlavaForConditionalGeneration

from dyvte.errors import ModelError
from dyvte.testbed.smol import base
from dyvte.testbed.tokenizer import llava_processor

PARTS = Path(__file__).with_name("parts")
"""What ships: `adapter/` (peft), `projector.safetensors`, `training.json`."""

TOWER = Path(__file__).parents[1] / "weights"
HELD_OUT_TEXT = Path(__file__).with_name("held_out.txt")
SETTINGS = "assembled.json"


def cache_folder() -> Path:
    """Where the assembled model lies: `$DYVTE_CACHE`, else `dyvte` in the user's cache folder."""
    chosen = os.environ.get("DYVTE_CACHE")
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(chosen) if chosen else caches / "dyvte"


def assembled_folder() -> Path:
    """Folder of the assembled `llava_smol`, whether or not it is there yet."""
    return cache_folder() / "llava_smol"


def _fingerprint(parts: Path) -> str:
    files = sorted(p for p in parts.rglob("*.safetensors"))
    if not files:
        raise ModelError(f"{parts} holds no trained parts (*.safetensors)")
    return "-".join(base.sha256(p)[:12] for p in files)


def is_assembled(parts: Path = PARTS) -> bool:
    """Whether the assembled model is there and made of the parts that ship."""
    settings = assembled_folder() / SETTINGS
    return settings.is_file() and json.loads(settings.read_text()).get("parts") == _fingerprint(parts)


def fetch_language_model(folder: Path) -> tuple[LlamaForCausalLM, Any, str]:
    """The language model, its tokenizer with the image's placeholder, and where it came from.

    The package's weights, on which the adapter was trained, come first; the original on the Hub, which differs from
    them by the rounding to four bits, where no package index answers. A `ModelError` names both.
    """
    try:
        base.download_package(folder)
        tokenizer = base.build_tokenizer(folder, gguf_file=base.GGUF_FILE)
        return base.load_language_model(folder), tokenizer, base.PACKAGE
    except ModelError as package_error:
        try:
            from transformers import AutoModelForCausalLM

            model = AutoModelForCausalLM.from_pretrained(base.HUB_ID, dtype=torch.float32, use_safetensors=True)
            return model.eval(), base.build_tokenizer(base.HUB_ID), base.HUB_ID
        except (OSError, ValueError) as hub_error:
            reason = " ".join(str(hub_error).split())[:120]
            raise ModelError(
                f"the language model of llava_smol was found neither as a package ({package_error}) nor on the Hub "
                f"({base.HUB_ID}: {reason}); connect to one of them and run it again"
            ) from None


def assemble(parts: Path = PARTS, target: Path | None = None) -> dict[str, Any]:
    """Fetch, check, merge and write the model; returns what is also written to `assembled.json`.

    Args:
        parts: Folder with `adapter/` (absent: the language model as it is), `projector.safetensors` and
            `training.json`, which says whether the decoder was one without pretraining.
        target: By default `assembled_folder()`; replaced at once when everything is written.
    """
    target = target or assembled_folder()
    language, tokenizer, source = fetch_language_model(cache_folder() / "downloads")
    trained = json.loads((parts / "training.json").read_text()).get("settings", {})
    if trained.get("random_decoder"):
        language = base.without_pretraining(language, trained["seed"])
    text = HELD_OUT_TEXT.read_text()
    before = base.perplexity(language, tokenizer, text)
    if (parts / "adapter").is_dir():
        from peft import PeftModel

        language = PeftModel.from_pretrained(language, parts / "adapter").merge_and_unload().eval()
    after = base.perplexity(language, tokenizer, text)
    tower = LlavaForConditionalGeneration.from_pretrained(TOWER, local_files_only=True).model.vision_tower
    model = base.join(language, tower, tokenizer)
    model.model.multi_modal_projector.load_state_dict(load_file(parts / "projector.safetensors"))
    settings = {
        "language_model": source,
        "parts": _fingerprint(parts),
        "perplexity_before": round(before, 3),
        "perplexity_after": round(after, 3),
    }
    scratch = target.with_name(f"{target.name}.{os.getpid()}.partial")
    scratch.mkdir(parents=True, exist_ok=True)
    model.float().save_pretrained(scratch)
    llava_processor(tokenizer, tower.config.patch_size).save_pretrained(scratch)
    (scratch / SETTINGS).write_text(json.dumps(settings, indent=1))
    if target.exists():
        shutil.rmtree(target)
    scratch.replace(target)
    return settings


def export_parts(
    projector: Mapping[str, Tensor], adapter: Mapping[str, Tensor] | None, folder: Path, record: dict[str, Any]
) -> None:
    """Write what was trained, in bfloat16: the adapter in the format of peft, the projector, and the run's record.

    The adapter is the state of what `dyvte.testbed.smol.train.add_adapter` returns, None where the projector alone was
    trained; `training.json` is to hold the record.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = {k: v.detach().to(torch.float32).contiguous() for k, v in projector.items()}
    save_file(state, folder / "projector.safetensors")
    if adapter is not None:
        tensors = {}
        for key, matrix in adapter.items():
            name, side, *_ = key.split(".")
            place = f"base_model.model.model.{name.replace('/', '.')}.lora_{side}.weight"
            tensors[place] = matrix.detach().to(torch.bfloat16).contiguous()
        rank = min(tensors[place].shape)
        (folder / "adapter").mkdir(exist_ok=True)
        save_file(tensors, folder / "adapter" / "adapter_model.safetensors")
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base.HUB_ID,
            "r": rank,
            "lora_alpha": 2 * rank,
            "lora_dropout": 0.0,
            "bias": "none",
            "target_modules": base.LINEAR,
            "inference_mode": True,
        }
        (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config, indent=1))
    (folder / "training.json").write_text(json.dumps(record, indent=1))


def main() -> None:
    """Assemble the shipped model unless it is there already, or the parts of another run, and say what it is."""
    parser = argparse.ArgumentParser(prog="dyvte smol", description=__doc__.split("\n")[0])
    parser.add_argument("--parts", type=Path, default=PARTS, help="parts folder of a run, by default what ships")
    parser.add_argument("--target", type=Path, help="folder to write, by default where model=llava_smol looks")
    chosen = parser.parse_args()
    target = chosen.target or assembled_folder()
    if chosen.target is None and chosen.parts != PARTS:
        parser.error("--parts of another run need a --target of their own; model=llava_smol stays the model that ships")
    if chosen.target is None and is_assembled():
        settings = json.loads((target / SETTINGS).read_text())
        print(f"llava_smol is in {target} already")
    else:
        try:
            settings = assemble(chosen.parts, target)
        except (ModelError, FileNotFoundError) as error:
            raise SystemExit(f"error: {error}") from None
        print(f"written to {target}")
    print(
        f"language model: {settings['language_model']}; perplexity of a held-out text {settings['perplexity_before']} "
        f"as fetched, {settings['perplexity_after']} with the adapter"
    )


if __name__ == "__main__":
    main()
