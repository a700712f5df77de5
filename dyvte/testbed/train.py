"""Train the testbed by LLaVA's recipe: ``python -m dyvte.testbed.train`` (Hydra, ``conf/testbed.yaml``).

Stages, each with its own checkpoints, resumed where they stopped:

language   the decoder learns scenes described in words, questions about them, and arithmetic (no image)
vision     the tower learns, without questions, which attributes lie under each patch; frozen from then on
align      the projector alone learns to caption images with the frozen decoder (LLaVA's stage 1)
instruct   projector and decoder learn to answer questions about images (LLaVA's stage 2), in phases

A batch is a pure function of (seed, stage, step), so a killed and resumed run equals an uninterrupted one.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import LlavaForConditionalGeneration

from dyvte.errors import ConfigError
from dyvte.runs.config import command
from dyvte.testbed.model import TestbedSizes, build_model
from dyvte.testbed.packing import PackedBatch
from dyvte.testbed.questions import IMAGE_KINDS
from dyvte.testbed.tokenizer import build_processor
from dyvte.testbed.training.batches import STAGES, Batches, phases
from dyvte.testbed.training.forward import (
    device_and_precision,
    fast_training,
    hidden_states,
    image_accuracy,
    initialise_projector,
    packed_accuracy,
    packed_loss,
    visual_features,
)
from dyvte.testbed.training.loop import continue_from, load_stages, run_stage
from dyvte.testbed.training.vision import PatchHeads, vision_batch
from dyvte.testbed.world import IMAGE_SIZE, sample_scene


def train(cfg: DictConfig, folder: Path) -> LlavaForConditionalGeneration:
    """Run the configured stages; returns the model after the last of them."""
    sizes = TestbedSizes(**OmegaConf.to_container(cfg.sizes))  # type: ignore[arg-type]
    if unknown := [s for s in cfg.stages if s not in STAGES]:
        raise ConfigError(f"unknown testbed stages {unknown}: stages= takes a list from {list(STAGES)}")
    device, precision = device_and_precision(cfg)
    model = build_model(sizes, cfg.seed).to(device)
    batches = Batches(cfg, sizes)
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    language = model.model.language_model
    decoder = torch.compile(language, dynamic=False) if cfg.compile else language
    talk = nn.ModuleDict({"decoder": language, "lm_head": model.lm_head})

    def loss(packed: tuple[PackedBatch, Tensor | None]) -> Tensor:
        batch, images = packed[0].to(device), packed[1]
        with fast_training(device, precision):
            features = None
            if images is not None:
                with torch.no_grad():
                    features = visual_features(model, images.to(device))
            states = hidden_states(model, decoder, batch, features)
        return packed_loss(model, states.float(), batch)

    held_out = functools.cache(lambda: batches.validation(cfg.validation_scenes))

    def accuracy() -> dict[str, float]:
        with fast_training(device, precision):
            return image_accuracy(model, held_out(), IMAGE_KINDS)

    def language_accuracy() -> dict[str, float]:
        batch = batches.language(10**6, 1.0, cfg.validation_scenes)  # a step that training never reaches
        with fast_training(device, precision):
            return packed_accuracy(model, batch, None)

    if cfg.init_from:
        parts = {"tower": tower, "projector": projector, "talk": talk}
        source = Path(cfg.init_from)
        if (source / "config.json").is_file():
            continue_from(model, source)
        else:
            load_stages(source, [s for s in STAGES if s not in cfg.stages], parts)
    heads = PatchHeads(sizes.vision_width, IMAGE_SIZE // sizes.patch_size).to(device)

    def patch_loss(batch: tuple[Tensor, dict[str, Tensor]]) -> Tensor:
        images, labels = batch
        with fast_training(device, precision):
            outputs = heads(visual_features(model, images.to(device)))
        losses = [cross_entropy(outputs[a].float().flatten(0, 1), labels[a].to(device).flatten()) for a in outputs]
        return torch.stack(losses).sum()

    @torch.no_grad()
    def patch_accuracy() -> dict[str, float]:
        images, labels = vision_batch(cfg, sizes, 0, "validation")
        with fast_training(device, precision):
            outputs = heads(visual_features(model, images.to(device)))
        on_object = labels["color"] > 0
        return {a: float((outputs[a].argmax(-1).cpu() == labels[a])[on_object].float().mean()) for a in outputs}

    def run(name: str, settings: DictConfig, **modules: nn.Module) -> None:
        """One stage, or one phase of instruction, with what it trains and how it is judged."""
        stage = name if name in STAGES else "instruct"
        steps = Batches(settings, sizes)
        batch_of, loss_of, evaluate = {
            "language": (lambda k, p: (steps.language(k, p, cfg.language.batch_size), None), loss, language_accuracy),
            "vision": (lambda k, p: vision_batch(cfg, sizes, k, "vision"), patch_loss, patch_accuracy),
            "align": (lambda k, p: steps.align(k, cfg.align.batch_size), loss, accuracy),
            "instruct": (steps.instruct_or_text, loss, accuracy),
        }[stage]
        run_stage(name, folder, modules, settings[stage], batch_of, loss_of, evaluate, settings.seed, cfg.workers)

    for name in (s for s in STAGES if s in cfg.stages):
        if name == "language":
            run(name, cfg, talk=talk)
        elif name == "vision":
            run(name, cfg, tower=tower, heads=heads)
        elif name == "align":
            tower.requires_grad_(False)
            talk.requires_grad_(False)
            if not (folder / "align.pt").exists():
                torch.manual_seed(cfg.seed)
                fitted = [sample_scene("caption", cfg.seed, i) for i in range(cfg.align.projector_scenes)]
                initialise_projector(model, fitted, batches.ids)
            run(name, cfg, projector=projector)
            talk.requires_grad_(True)
        else:
            tower.requires_grad_(False)
            for phase, settings in phases(cfg):
                run(phase, settings, projector=projector, talk=talk)
    return model


def export(model: LlavaForConditionalGeneration, patch_size: int, folder: Path) -> None:
    """Write model and processor in transformers format, as ``AutoModelForImageTextToText`` reads it."""
    model.float().save_pretrained(folder)
    build_processor(patch_size).save_pretrained(folder)


@command("testbed")
def main(cfg: DictConfig) -> None:
    """Train the configured stages; after the last one write the model in transformers format."""
    folder = Path(cfg.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(cfg, folder / "config.yaml", resolve=True)
    model = train(cfg, folder)
    if "instruct" in cfg.stages:
        export(model, cfg.sizes.patch_size, folder / "model")
        print(f"model written to {folder / 'model'}")


if __name__ == "__main__":
    main()
