"""The logit lens, layer by layer: `python -m analysis.lens`.

When the answer appears at the end of the prompt, with and without an exit; what each patch of the image says, and on
the built-in tasks how often that is true of the object under it (`docs/causes.md`).
"""

from __future__ import annotations

from functools import partial
from typing import Any

from matplotlib import pyplot as plt
from omegaconf import DictConfig

from dyvte.data import Dataset, build_dataset
from dyvte.errors import ConfigError
from dyvte.instrument.hooks import check_model
from dyvte.mllm import MLLM
from dyvte.runs import store
from dyvte.runs.config import command, load_model

from .measuring.attention import file_name
from .measuring.lens import LensMeasurement, patch_words
from .measuring.runs import finish_run, measure_dataset, run_facts
from .plots import lens as plots
from .statistics.bands import ImageBootstrap, count_images, keyed_array, mean_band, rate_band


@command("lens")
def main(cfg: DictConfig) -> str | None:
    """Measure, summarise and draw; continues where an earlier run of the same command was stopped."""
    dataset = build_dataset(cfg.data)
    summary = run(cfg, load_model(cfg), dataset)
    return "; ".join(outline(summary)) if summary else None


def run(cfg: DictConfig, mllm: MLLM, dataset: Dataset) -> dict[str, Any] | None:
    """The command with a model and data that are loaded already; None in processes other than the main one."""
    check_model(mllm)
    if cfg.exit_layer is not None and not 0 <= cfg.exit_layer <= mllm.num_layers:
        raise ConfigError(f"exit_layer is {cfg.exit_layer}; this model has exit layers 0..{mllm.num_layers}")
    measure = LensMeasurement(mllm, cfg.exit_layer, cfg.seed)
    folder = measure_dataset(cfg, mllm, dataset, measure, exit_layer=cfg.exit_layer)
    if folder is None:
        return None
    return finish_run(folder, summarise_lens(cfg, folder, mllm), partial(draw, mllm, dataset, cfg.grids))


def summarise_lens(cfg: DictConfig, folder: store.RunFolder, mllm: MLLM) -> dict[str, Any]:
    """Curves over layers 0..L with bands over images."""
    answers = folder.read_table("answers")
    curves = {}
    for exit_layer, rows in answers.groupby("exit_layer"):
        name = "no exit" if exit_layer == mllm.num_layers else f"exit at {exit_layer}"
        ids, images = rows.drop_duplicates("id")[["id", "image_id"]].to_numpy().T
        probability, right = (keyed_array(rows, each, ids, "layer") for each in ("answer_probability", "is_answer"))
        curves[name] = {
            "answer_probability": mean_band(probability, ImageBootstrap(images, cfg.bootstrap, cfg.seed)).to_dict(),
            "is_answer": rate_band(right, images).to_dict(),
        }
    content = {
        **run_facts(cfg, mllm),
        "num_questions": int(answers["id"].nunique()),
        "num_images": count_images(answers["image_id"].unique()),
        "answer": curves,
        "patches": {},
    }
    if (folder.path / "patches.parquet").is_file():  # only where the generator of the images tells what they show
        patches = folder.read_table("patches")
        for attribute, rows in patches.groupby("attribute"):
            images, rows = rows["image_id"].unique(), rows.rename(columns={"image_id": "id"})
            content["patches"][attribute] = {
                column: rate_band(keyed_array(rows, column, images, "layer"), images).to_dict()
                for column in ("share", "control")
            }
    return content


def draw(mllm: MLLM, dataset: Dataset, grids: int, content: dict[str, Any]) -> dict[str, plt.Figure]:
    """All figures, by file name."""
    figures = {"answer": plots.draw_answer_lens(content)}
    if content["patches"]:
        figures["patches"] = plots.draw_patch_lens(content)
    seen: set[str] = set()
    for sample in dataset.readable():
        if len(seen) >= grids:
            break
        if sample.image is not None and sample.image_id not in seen:
            seen.add(sample.image_id)
            words, probabilities = patch_words(mllm, sample)
            if (grid := plots.draw_lens_grid(sample.image, words, probabilities.numpy())) is not None:
                figures[f"grid_{file_name(sample.image_id)}"] = grid
    return figures


def outline(summary: dict[str, Any]) -> list[str]:
    """In words: from which layer on the answer is the likeliest token, and what patches say."""
    lines = []
    for name, curves in summary["answer"].items():
        shares = curves["is_answer"]["mean"]
        first = next((layer for layer in range(len(shares)) if min(shares[layer:]) >= 0.5), None)
        words = "in no layer" if first is None else f"from layer {first} of {summary['num_layers']} on"
        lines.append(f"{name}: the answer is the likeliest token at the prompt's end for half of the questions {words}")
    for attribute, curves in summary["patches"].items():
        best = max(range(len(curves["share"]["mean"])), key=lambda layer: curves["share"]["mean"][layer])
        share, control = curves["share"]["mean"][best], curves["control"]["mean"][best]
        chance = f"{share:.0%} ({control:.0%} by chance)"
        lines.append(f"patches of an object name its {attribute} most often after layer {best}: {chance}")
    return lines


if __name__ == "__main__":
    main()
