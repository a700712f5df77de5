"""`python -m dyvte.generate image=FILE question="..."`: answer one question and draw where its visual tokens left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from PIL import Image

from dyvte.calibrate import calibrated_policy
from dyvte.cost.flops import prefill_flops
from dyvte.data.base import build_dataset
from dyvte.data.reading import find_image, read_image, read_question
from dyvte.errors import BrokenSample, ConfigError
from dyvte.policies.exits.dynamic_exit import DynamicExit, exit_probabilities
from dyvte.runs.config import command, load_model
from dyvte.runs.figures import exit_of_one_question
from dyvte.runs.store import RunFolder, write_json


@command("generate")
def main(cfg: DictConfig) -> str:
    """Answer the question of `conf/generate.yaml`."""
    return str(generate(cfg)["in_words"])


@torch.no_grad()
def generate(cfg: DictConfig) -> dict[str, Any]:
    """Answer with and without the policy; write `summary.json` and the figure."""
    image, question = _what_to_ask(cfg)
    mllm = load_model(cfg)
    folder = RunFolder(Path(cfg.output_dir))
    folder.path.mkdir(parents=True, exist_ok=True)
    policy = calibrated_policy(mllm, cfg, folder.path)
    batch = mllm.encode([image], [question])
    (full_answer,) = mllm.generate(batch, max_new_tokens=cfg.max_new_tokens)
    full = prefill_flops(mllm, batch)
    with policy(mllm) as run:
        (answer,) = mllm.generate(batch, max_new_tokens=cfg.max_new_tokens)
        exit_layer, asked = int(run.exit_layers[0]), exit_probabilities(run)
        count = prefill_flops(mllm, batch)
    probability = {k: float(each[0]) for k, each in asked.items() if k <= exit_layer}
    summary = {
        "model": cfg.model.name,
        "policy": cfg.policy.name,
        "question": question,
        "answer": answer,
        "full_answer": full_answer,
        "num_layers": mllm.num_layers,
        "exit_layer": exit_layer,
        "exit_probabilities": probability,
        "flops_decoder": count.decoder,
        "cost": count.decoder / full.decoder,
    }
    left = (
        f"left after {exit_layer} of {mllm.num_layers} layers" if exit_layer < mllm.num_layers else "stayed to the end"
    )
    same = "as the full model answers" if answer == full_answer else f"where the full model answers {full_answer}"
    summary["in_words"] = (
        f"{answer}, {same}; all visual tokens {left}: {summary['cost']:.0%} of its decoder FLOPs in the prefill."
    )
    write_json(folder.path / "summary.json", summary)
    print(f"question: {question}\nanswer: {answer}")
    if isinstance(policy, DynamicExit):
        figure = exit_of_one_question(image, question, str(answer), probability, policy.thresholds, exit_layer)
        print(f"figure: {folder.save_figure('exit', figure)}")
    return summary


def _what_to_ask(cfg: DictConfig) -> tuple[Image.Image, str]:
    if cfg.image is None:
        dataset = build_dataset(cfg.data)
        for index in range(len(dataset)):
            sample = dataset[index]
            # of the built-in tasks not the questions that are answered without looking
            if sample.picture is not None and sample.metadata.get("hops", 1):
                return sample.picture, cfg.question or sample.question
        raise ConfigError(f"no question of data={cfg.data.name} needs an image; give image=FILE question=...")
    if not cfg.question:
        raise ConfigError('no question: give question="..." with the image')
    where = f"image={cfg.image}"
    if not isinstance(cfg.image, str):
        raise ConfigError(f"{where}: give a file name")
    try:
        content = find_image(cfg.image, None, where, allow_outside=True)
        return read_image(content, cfg.image, where), read_question(cfg.question, "question")
    except BrokenSample as error:
        raise ConfigError(str(error)) from error


if __name__ == "__main__":
    main()
