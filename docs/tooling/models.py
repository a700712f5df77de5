"""`python -m docs.tooling.models`: what works with which model, checked without weights, as docs/models.md.

Every configuration in `conf/model/` has its published hyper-parameters in `conf/model/_architecture/`. Each is built
in full size on the meta device (layers, visual tokens, FLOPs), and as a narrow and shallow random copy on the CPU, on
which the instruments are compared with plain computations; so is every image-text-to-text architecture of transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
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
from docs.tooling.generated import fill, write_generated
from dyvte.batch import Batch
from dyvte.cost.flops import FlopCounter, decoder_inputs
from dyvte.errors import DyvteError
from dyvte.instrument.hooks import LayerCall, Selection, drive_layers, with_states
from dyvte.instrument.keys.shared import PrefillSharing
from dyvte.instrument.running_state import packed_arguments
from dyvte.layout import INSTRUCTION, VISUAL
from dyvte.mllm import MLLM
from dyvte.model_parts import runs_together
from dyvte.runs.config import command, config_folder
from tests.zoo.checks import CAUSES, CHECKS, TOLERANCE, Subject, outcome
from tests.zoo.specimens import build_model
from tests.zoo.verdicts import VARIANTS, VERDICTS, Verdict

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


# ---------------------------------------------------------- every architecture of transformers


@dataclass(frozen=True)
class Finding:
    """What came out for one architecture of transformers: what dyvte does with a small random model of it.

    Attributes:
        verdict: "works", "in part" or "refused".
        largest: difference over the checks that ran to their end; None without one.
        knockout: difference of the knock-out; None where it is refused.
        reason: of what is refused or does not agree.
    """

    verdict: str
    largest: float | None
    knockout: float | None
    reason: str


def examine(name: str, expected: Verdict) -> Finding:
    """Build an architecture in small and run every check on it."""
    model = build_model(expected.architecture or name, **expected.changes)
    try:
        mllm = dyvte.wrap(model)
    except DyvteError as refusal:
        return Finding("refused", None, None, str(refusal))
    subject = Subject(mllm)
    found = {check: outcome(run, subject) for check, run in CHECKS.items()}
    knockout = {check: outcome(run, subject) for check, run in CAUSES.items()}["knock-out"]
    numbers = {check: each for check, each in found.items() if isinstance(each, float)}
    good = {check: each for check, each in numbers.items() if each < TOLERANCE}
    wrong = {check: f"differs by {each:.0e}" for check, each in numbers.items() if check not in good}
    wrong |= {check: each for check, each in found.items() if isinstance(each, str)}
    by_reason: dict[str, list[str]] = {}
    for check, reason in wrong.items():
        by_reason.setdefault(reason.partition(": ")[2] or reason, []).append(check)
    reasons = "; ".join(f"{', '.join(checks)}: {reason}" for reason, checks in by_reason.items())
    verdict = "refused" if not good else "in part" if wrong else "works"
    cut = knockout if isinstance(knockout, float) else None
    if verdict == "works" and isinstance(knockout, str):
        reasons = knockout.partition(": ")[2]
    return Finding(verdict, max(good.values(), default=None), cut, reasons)


def architecture_tables() -> dict[str, str]:
    """Rows of the page's tables of architectures and of variants, and how many architectures work."""
    found = {
        name: examine(name, verdict)
        for name, verdict in tqdm((VERDICTS | VARIANTS).items(), desc="architectures", dynamic_ncols=True)
    }
    works = sum(found[name].verdict == "works" for name in VERDICTS)
    return {
        "architectures": "\n".join(_row(name, found[name]) for name in VERDICTS),
        "variants": "\n".join(_row(name, found[name]) for name in VARIANTS),
        "count": f"{works} of {len(VERDICTS)}",
    }


def _row(name: str, finding: Finding) -> str:
    largest, cut = ("-" if each is None else f"{each:.0e}" for each in (finding.largest, finding.knockout))
    reason = finding.reason.replace("|", "\\|").replace("\n", " ")
    return f"| {name} | {finding.verdict} | {largest} | {cut} | {reason} |"


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
    return fill("models_page", {"models": "\n".join(rows), "checks": "\n".join(checks), **architecture_tables()})


def _way_in(name: str) -> str:
    settings = yaml.safe_load((config_folder() / "model" / f"{name}.yaml").read_text())
    if "exported" in settings["defaults"]:
        return "export"
    return "convert" if settings["path"] == "???" else "Hub"


if __name__ == "__main__":
    main()
