"""What `knockout` costs against one masked forward for each path and window.

    python -m benchmarks.knockout --naive 12

The model of the sweep's benchmark (24 layers; 32 system, 576 visual, 32 instruction tokens). Both sides run in one
process, alternating; the masked forwards are timed on a sample of the windows and scaled to all of them.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch

from benchmarks.common import machine, random_llava, random_prompts
from dyvte import knockout
from dyvte.batch import Batch
from dyvte.instrument.causal import all_windows
from dyvte.instrument.causal.groups import group_masks
from dyvte.mllm import MLLM

PATHS = [("question", "visual"), ("question", "question"), ("last", "visual"), ("last", "question")]


@torch.no_grad()
def masked_forward(
    mllm: MLLM, batch: Batch, path: tuple[str, str], window: tuple[int, int], invert: bool
) -> torch.Tensor:
    """Logits [B, vocab] at the prompt's end of one full forward with an edited mask."""
    groups, length = group_masks(batch.layout), batch["input_ids"].shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    cut = groups[path[0]][:, :, None] & groups[path[1]][:, None, :] & ~torch.eye(length, dtype=torch.bool)
    mask = (causal & ~cut)[:, None]

    def edit(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "attention_mask": mask}

    layers = [each for each in range(mllm.num_layers) if (window[0] <= each < window[1]) != invert]
    handles = [mllm.layers[each].register_forward_pre_hook(edit, with_kwargs=True) for each in layers]
    try:
        return mllm.model(**batch, use_cache=False, logits_to_keep=1).logits[:, -1]
    finally:
        for handle in handles:
            handle.remove()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--naive", type=int, default=12, help="masked forwards that are timed")
    options = parser.parse_args()
    mllm = random_llava(options.layers, options.hidden, min(128, options.hidden), vocabulary=32064)
    batch = random_prompts(mllm, 1, 32, 32)
    of_width = [(start, min(start + 4, options.layers)) for start in range(options.layers)]
    print(machine())
    for name, paths, windows, invert in (
        ("96 knock-outs of width 4", PATHS, of_width, False),
        ("entry x exit map", [("instruction", "visual")], all_windows(options.layers), True),
        ("image -> image, width 4", [("visual", "visual")], of_width, False),
    ):
        jobs = [(p, w) for p in range(len(paths)) for w in range(len(windows))]
        chosen = jobs[:: max(1, len(jobs) // options.naive)]
        half = len(chosen) // 2
        naive, fast, worst = 0.0, [], 0.0
        for part in (chosen[:half], chosen[half:]):
            start = time.perf_counter()
            cut = knockout(mllm, batch, None, paths, windows, invert)
            fast.append(time.perf_counter() - start)
            assert cut.logits is not None
            for p, w in part:
                start = time.perf_counter()
                logits = masked_forward(mllm, batch, paths[p], windows[w], invert)
                naive += time.perf_counter() - start
                worst = max(worst, (logits - cut.logits[:, p, w]).abs().max().item())
        whole = naive / len(chosen) * len(jobs)
        print(
            f"{name}: {min(fast):.2f} s against {whole:.1f} s, {whole / min(fast):.1f}x; logits within {worst:.1e}",
            flush=True,
        )


if __name__ == "__main__":
    main()
