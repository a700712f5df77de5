"""`python -m docs.tooling.models`: what works with which model, checked without weights, as docs/models.md.

Every configuration in `conf/model/` has its published hyper-parameters in `conf/model/_architecture/`. Each is built
in full size on the meta device (layers, visual tokens, FLOPs), and as a narrow and shallow random copy on the CPU, on
which the instruments are compared with plain computations.
"""

from __future__ import annotations

import torch
import yaml
from omegaconf import DictConfig
from torch import Tensor
from tqdm import tqdm

import dyvte
import dyvte.conversion.downsample  # makes a model known to transformers
from benchmarks.architectures import (
    Architecture,
    architecture,
    count_visual_tokens,
    full_size,
    image_inputs,
    names,
    prompt,
    small_copy,
)
from docs.tooling.generated import write_generated
from docs.tooling.refusals import peculiar, verdict
from dyvte.batch import Batch
from dyvte.cost.flops import FlopCounter
from dyvte.layout import INSTRUCTION, VISUAL
from dyvte.mllm import MLLM
from dyvte.runs.config import command, config_folder

# ------------------------------------------------------------------------- measuring


@torch.no_grad()
def prefill_tflops(mllm: MLLM, known: Architecture, exit_layer: int) -> float:
    """TFLOPs of a prefill's decoder and last logits under an exit, from a model on the meta device."""
    total = 0
    for length, layers in (
        (known.visual_tokens + known.text_tokens, mllm.layers[:exit_layer]),
        (known.text_tokens, mllm.layers[exit_layer:]),
    ):
        kept, mllm.decoder.layers = mllm.decoder.layers, torch.nn.ModuleList(layers)
        try:
            states = torch.zeros(1, length, mllm.hidden_size, device="meta", dtype=mllm.dtype)
            with FlopCounter(mllm) as counter:
                mllm.decoder(inputs_embeds=states)  # with a cache: without one, packed sequences are looked for
            total += counter.count.total
        finally:
            mllm.decoder.layers = kept
    return (total + 2 * mllm.lm_head.weight.numel()) / 1e12


@torch.no_grad()
def vision_tflops(mllm: MLLM, known: Architecture) -> float | None:
    """TFLOPs of one image in tower and projector; None where that code needs values, which the meta device lacks."""
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
    found = probe.stats.mass[0, :, :, INSTRUCTION, VISUAL]
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
    """Attention mass [L, H] from the instruction to the image, from the maps of eager attention."""
    maps: list[Tensor] = []
    handles = [
        module.register_forward_hook(lambda module, args, output: maps.append(output[1][0]))
        for module in mllm.attentions
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
        full, half = (prefill_tflops(mllm, known, layer) for layer in (mllm.num_layers, middle))
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
    refusals = [f"| {name} | {what} | {verdict(settings)} |" for name, what, settings in peculiar()]
    return PAGE.format(models="\n".join(rows), checks="\n".join(checks), refusals="\n".join(refusals))


def _way_in(name: str) -> str:
    settings = yaml.safe_load((config_folder() / "model" / f"{name}.yaml").read_text())
    if "exported" in settings["defaults"]:
        return "export"
    return "convert" if settings["path"] == "???" else "Hub"


PAGE = """# Models

Written by `python -m docs.tooling.models`; do not edit.

**Nothing on this page was run with real weights.** The models were built from their published hyper-parameters, in full
size without weights (layers, visual tokens, FLOPs) and as narrow, shallow random copies (the comparisons). Numbers of a
real model, its stages and exits, come from running the commands on it.

## What there is

`model=NAME` with every command. *Hub*: the weights are downloaded when the model is first used. *convert*: the
checkpoint is of the LLaVA code base, `python -m dyvte.convert` turns it into a folder, `model.path=FOLDER` names it.
*export*: its vision side runs in its own environment ([how to](how_to_llava_forks.md)). Any other image-text-to-text
model of transformers: `model=hf model.path=OWNER/NAME`.

Parameters in billions; TFLOPs of one prefill with the visual tokens given and 64 text tokens, decoder and last logits,
without an exit and with the visual tokens leaving after half of the layers; then those of the vision side for one image
(-: not counted, its code needs values).

| model | way in | type | layers | visual tokens | parameters | TFLOPs | exit at half | vision |
|---|---|---|--:|--:|--:|--:|--:|--:|
{models}

The processors of Qwen-VL, InternVL, LLaVA-OneVision, Mistral, GLM-V and SmolVLM need torchvision (SmolVLM also
num2words): `pip install 'dyvte[models]'`. Without it, loading them says so.

## Compared in small

On a random copy with 4 to 6 narrow layers and the real geometry of images: the largest difference between the probe's
attention mass and the maps of eager attention; between `exit_sweep` and one run per exit (logits); between exit L and
no exit; between two images under exit 0 (must be 0); and, so that these mean something, how far another image moves the
logits without an exit. The tests repeat this for smaller images, add generation under exits against a full
recomputation with masked visual keys, and run stages, exits, train, evaluate and generate on a copy of every model
below.

| model | probe | sweep | exit L | exit 0 | image matters |
|---|--:|--:|--:|--:|--:|
{checks}

## Decoders that are not plain

- **Multimodal rotary positions** (Qwen-VL, GLM-V): text keeps the positions that the model gave it when visual tokens
  leave.
- **DeepStack** (Qwen3-VL): the visual features that are added after early layers go to visual positions only; after an
  exit these no longer take part, so an exit before the last of these layers drops them too.
- **Sliding windows** (Gemma 3): a window counts original positions, also after an exit.
- **Attention in both directions** (Gemma 3 within an image, PaliGemma within the prompt): masks are cut from the
  model's own. Where text before the image sees the image, `exit_sweep` carries that text in every branch and shares no
  prefix.
- **Image markers**: visual are the placeholders that image features replace, and nothing else. Tokens that stand
  before, between or after them (`<|vision_start|>`, `[IMG_BREAK]`, `<end_of_image>`, a line break) are text: `system`
  before the first placeholder, `instruction` after it. They stay when visual tokens leave. The line breaks that
  LLaVA-NeXT puts among the features take placeholders and are visual.

| family | what is peculiar | what happens |
|---|---|---|
{refusals}

## Weights

- **Safetensors only**, with one exception: many checkpoints of the LLaVA code base are `.bin` only, which
  `dyvte.convert` and `model=exported` read as tensors alone (`torch.load(weights_only=True)`; a file that would run
  code is refused).
- **Pinned**: `model.revision=COMMIT` fixes what is downloaded. Without it the default branch is taken, and the
  `config.yaml` of each run names the commit that this was ([how to](how_to_own_model.md#the-same-weights-again)).
- **Offline**: with `HF_HUB_OFFLINE=1` nothing is asked of the Hub and what is cached is used.
- **Remote code** is off: what comes with a repository runs only with `model.trust_remote_code=true`, and a model that
  needs it says so.
- **Gated models** (Gemma) need `hf auth login` after accepting their terms, and say so.
- **Quantized**: `model.quantization_config` goes to transformers as it is (`'{{load_in_4bit: true}}'` with
  `dyvte[quantization]`). Tested with a stand-in of 8-bit layers, not with bitsandbytes itself.
- **Spread**: `model.device_map=auto` puts a model on several devices, memory and disk.
"""


if __name__ == "__main__":
    main()
