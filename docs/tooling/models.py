"""`python -m docs.tooling.models`: what works with which model, checked without weights, as docs/models.md.

Every configuration in `conf/model/` has its published hyper-parameters in `conf/model/_architecture/`. Each is built
in full size on the meta device (layers, visual tokens, FLOPs), and as a narrow and shallow random copy on the CPU, on
which the instruments are compared with plain computations.
"""

from __future__ import annotations

from typing import Any

import torch
import yaml
from omegaconf import DictConfig
from torch import Tensor
from tqdm import tqdm

import dyvte
import dyvte.conversion.downsample  # makes a model known to transformers
from benchmarks.architectures import (
    Architecture,
    TimmStandIn,
    architecture,
    count_visual_tokens,
    full_size,
    image_inputs,
    names,
    prompt,
    small_copy,
)
from docs.tooling import zoo
from docs.tooling.generated import fill, write_generated
from dyvte.batch import Batch
from dyvte.cost.flops import FlopCounter, decoder_inputs
from dyvte.instrument.hooks import LayerCall, Selection, drive_layers, with_states
from dyvte.instrument.keys.shared import PrefillSharing
from dyvte.instrument.running_state import packed_arguments
from dyvte.layout import INSTRUCTION, VISUAL
from dyvte.mllm import MLLM
from dyvte.model_parts import runs_together
from dyvte.runs.config import command, config_folder

# ------------------------------------------------------------------------- measuring


@torch.no_grad()
def prefill_tflops(mllm: MLLM, known: Architecture, exit_layer: int) -> float:
    """TFLOPs of a prefill's decoder and last logits under an exit; the model may be on the meta device."""
    text = torch.arange(known.text_tokens, device=mllm.device)
    left = Selection(torch.zeros_like(text[:1]), text[None], None, everyone=True)  # which positions is the same

    def run(call: LayerCall) -> Any:
        if call.index < exit_layer:
            return call.run()
        together = runs_together(mllm.attentions[call.index])
        packed = packed_arguments(call, left) if together else call.packed(left)
        packed |= {"past_key_values": None, **PrefillSharing(call).on(left)}
        return with_states(call.run(left.pack(call.hidden), **packed), call.hidden)

    with drive_layers(mllm, run), FlopCounter(mllm) as counter:  # with a cache: else packed sequences are looked for
        mllm.decoder(**decoder_inputs(mllm, known.visual_tokens + known.text_tokens), use_cache=True)
    return (counter.count.total + 2 * mllm.lm_head.weight.numel()) / 1e12


@torch.no_grad()
def vision_tflops(mllm: MLLM, known: Architecture) -> float | None:
    """TFLOPs of one image in tower and projector; None where that code needs values, or a tower that is not here."""
    if any(isinstance(module, TimmStandIn) for module in mllm.model.modules()):
        return None
    inputs = {
        name: value.to("meta" if name == "pixel_values" else "cpu") for name, value in image_inputs(known).items()
    }
    inputs["pixel_values"] = inputs["pixel_values"].to(mllm.dtype)
    try:
        with FlopCounter(mllm) as counter:
            mllm.model.get_image_features(**inputs)
    except (RuntimeError, NotImplementedError, ValueError, TypeError):
        return None
    return counter.count.total / 1e12


@torch.no_grad()
def compare(known: Architecture) -> dict[str, float]:
    """Largest differences on a small copy: probe and eager maps, sweep and single exits, exit L and no exit.

    Exit 0 is compared between two images: nothing of them may be left.
    """
    mllm, eager = small_copy(known), small_copy(known, "eager")
    batch = prompt(mllm, known, count_visual_tokens(mllm, image_inputs(known)))
    other = Batch({**batch, "pixel_values": image_inputs(known, seed=1)["pixel_values"]}, batch.layout)
    text = batch.layout.text
    with dyvte.AttentionProbe(mllm, layout=batch.layout) as probe:
        plain = mllm.model(**batch, use_cache=False).logits
    found = probe.stats.mass[0, mllm.attention_layers, :, INSTRUCTION, VISUAL]
    sweep = dyvte.exit_sweep(mllm, batch)
    exits, blind = [], []
    for exit_layer in range(mllm.num_layers + 1):
        with dyvte.FixedExit(exit_layer)(mllm):
            exits.append(mllm.model(**batch, use_cache=False).logits)
            if exit_layer == 0:
                blind = [exits[0], mllm.model(**other, use_cache=False).logits]
    single = torch.stack([each[0, -1] for each in exits])
    return {
        "probe": float((found - _eager_cross_mass(eager, batch)).abs().max()),
        "sweep": float((sweep.logits[0] - single).abs().max()),
        "exit_all": float((exits[-1] - plain).abs().max()),
        "exit_none": float((blind[0] - blind[1])[text].abs().max()),
        "image_matters": float((plain - mllm.model(**other, use_cache=False).logits)[0, -1].abs().max()),
    }


def _eager_cross_mass(mllm: MLLM, batch: Batch) -> Tensor:
    """Attention mass [n, H] from the instruction to the image in the n layers that attend of eager attention's maps."""
    maps: list[Tensor] = []
    handles = [
        module.register_forward_hook(lambda module, args, output: maps.append(output[1][0]))
        for module in mllm.attentions
        if module is not None
    ]
    try:
        mllm.model(**batch, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    layout = batch.layout
    return torch.stack([each[:, layout.instruction[0]][:, :, layout.visual[0]].sum(-1).mean(-1) for each in maps])


# ----------------------------------------------------------------------------- page


@command("models")
def main(cfg: DictConfig) -> None:
    """Write the page that `conf/models.yaml` asks for."""
    write_generated(cfg.page, render(cfg.models or names()), "python -m docs.tooling.models")
    print(f"page: {cfg.page}")


def render(chosen: list[str]) -> str:
    """The page, checking each model on the way."""
    rows, checks = [], []
    for name in tqdm(chosen, desc="models", dynamic_ncols=True):
        known = architecture(name)
        way = _way_in(name)
        mllm = full_size(known)
        middle = mllm.num_layers // 2
        full = prefill_tflops(mllm, known, mllm.num_layers)
        half = prefill_tflops(mllm, known, middle)
        vision = None if way == "export" else vision_tflops(mllm, known)
        parameters = sum(each.numel() for each in mllm.model.parameters()) / 1e9
        found = compare(known)
        rows.append(
            f"| `{name}` | {way} | {known.config['model_type']} | {mllm.num_layers} | {known.visual_tokens} | "
            f"{parameters:.1f} | {full:.2f} | {half:.2f} | {'-' if vision is None else f'{vision:.2f}'} |"
        )
        checks.append(
            f"| `{name}` | {found['probe']:.0e} | {found['sweep']:.0e} | {found['exit_all']:.0e} | "
            f"{found['exit_none']:.0e} | {found['image_matters']:.1f} |"
        )
    return fill("models_page", {"models": "\n".join(rows), "checks": "\n".join(checks), **zoo.tables()})


def _way_in(name: str) -> str:
    settings = yaml.safe_load((config_folder() / "model" / f"{name}.yaml").read_text())
    if "exported" in settings["defaults"]:
        return "export"
    return "convert" if settings["path"] == "???" else "Hub"


if __name__ == "__main__":
    main()
