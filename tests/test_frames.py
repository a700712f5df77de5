"""A run on videos says which frame is looked at, layer by layer, and the report shows it with a map for each frame."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import families
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import Tensor

import dyvte
from analysis import stages
from analysis.report import samples as report_samples
from analysis.report.build import write_report
from dyvte.data import build_dataset
from dyvte.runs.config import compose

EXACT = 1e-4
MERGED = 4
"""Patches of Qwen-VL that become one visual token."""
SIDE = 4 * families.PATCH_SIZE
"""Pixels of a frame: 4 x 4 patches, of which four become a token."""


@dataclass
class FilmProcessor:
    """Makes Qwen2.5-VL's inputs of frames, one step a frame: its own video processor needs torchvision."""

    tokenizer: Any
    chat_template: str = families.CHAT_TEMPLATE.format(image="<image>", end=" ").replace("image", "video")
    video_processor: str = "this class"

    def apply_chat_template(self, messages: Any, add_generation_prompt: bool = False) -> str:
        settings = {"chat_template": self.chat_template, "add_generation_prompt": add_generation_prompt}
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, **settings))

    def __call__(self, text: Sequence[str], videos: Sequence[Any], padding_side: str, **_: Any) -> dict[str, Tensor]:
        frames = [np.stack([np.asarray(frame) for frame in film]) for film in videos]
        pixels = torch.tensor(np.concatenate(frames) / 255, dtype=torch.float32)  # [frames, height, width, 3]
        pixels = pixels.unflatten(2, (4, -1)).unflatten(1, (4, -1)).permute(0, 1, 3, 5, 2, 4).flatten(3)
        prompts = [
            prompt.replace("<video>", "<video>" * (len(film) * 16 // MERGED))
            for prompt, film in zip(text, videos, strict=True)
        ]
        inputs = self.tokenizer(prompts, padding=True, padding_side=padding_side, return_tensors="pt")
        return {
            "input_ids": inputs["input_ids"],
            "attention_mask": inputs["attention_mask"],
            "pixel_values_videos": pixels.reshape(-1, 3 * families.PATCH_SIZE**2),
            "video_grid_thw": torch.tensor([[len(film), 4, 4] for film in videos]),
            "mm_token_type_ids": 2 * (inputs["input_ids"] == families.VIDEO_TOKEN).int(),
        }


def write_films(folder: Path, lengths: Sequence[int]) -> list[str]:
    """Videos as lists of frames, a question each; the overrides that name them."""
    rng = np.random.default_rng(0)
    records = []
    for number, frames in enumerate(lengths):
        names = [f"{number}-{frame}.png" for frame in range(frames)]
        for name in names:
            Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(folder / name)
        record = {"question_id": f"q{number}", "video": names, "text": "<video> what color is the square ?"}
        records.append(json.dumps(record | {"answer": "red"}))
    (folder / "films.jsonl").write_text("\n".join(records))
    return ["data=llava_json", f"data.file={folder}/films.jsonl", f"data.image_folder={folder}"]


def test_the_report_shows_which_frame_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shares and the maps of each frame are what the eager model's attention gives."""
    tokenizer = families._tokenizer({"<video>": families.VIDEO_TOKEN})
    mllm = dyvte.wrap(families.FAMILIES["qwen2_5_vl"](num_layers=2).model, FilmProcessor(tokenizer))
    for module in (stages, report_samples):
        monkeypatch.setattr(module, "load_model", lambda cfg: mllm)
    data = write_films(tmp_path, [3, 3, 2])
    folder = tmp_path / "run"
    quick = ["bootstrap=20", "batch_size=2", "maps.count=1"]
    cfg = compose("stages", [*data, *quick, f"output_dir={folder}"])
    stages.main(cfg)

    sample = build_dataset(cfg.data)[0]
    batch = mllm.encode([sample.image], [sample.question])
    mllm.model.set_attn_implementation("eager")
    with torch.no_grad():
        attention = torch.stack(mllm.model(**batch, output_attentions=True).attentions)[:, 0, :, -1]  # [L, H, N]
    mllm.model.set_attn_implementation("sdpa")
    on_video = attention[..., batch.layout.visual[0]].mean(1).unflatten(1, (3, 4))  # [L, F, tokens]
    expected = on_video.sum(2) / on_video.sum((1, 2))[:, None]

    table = pd.read_parquet(folder / "frames.parquet")
    found = table[table["id"] == "q0"].pivot(index="layer", columns="frame", values="share").to_numpy()
    torch.testing.assert_close(torch.tensor(found).float(), expected, atol=EXACT, rtol=0)
    assert table.groupby("id")["frames"].first().to_dict() == {"q0": 3, "q1": 3, "q2": 2}
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["frames"]["num_videos"], summary["frames"]["left_out"]) == (2, 1)
    means = table[table["frames"] == 3].pivot_table(index="layer", columns="frame", values="share").to_numpy()
    np.testing.assert_allclose(summary["frames"]["share"]["mean"], means, atol=EXACT)

    page = tmp_path / "report"
    runs = [f"runs.stages={folder}", "samples.count=1", "samples.gates=null", f"output_dir={page}"]
    html = write_report(compose("report", [*data, *runs])).read_text()
    assert summary["frames"]["in_words"] in html
    lens = dyvte.logit_lens(mllm, batch, positions="visual", top=1)
    records = json.loads(html.partition('id="slider-data">')[2].partition("</script>")[0])["records"]
    assert [record["part"] for record in records] == [f"frame {number} of 3" for number in (1, 2, 3)]
    for number, record in enumerate(records):
        assert (record["rows"], record["columns"]) == (2, 2)
        relative = 4 * on_video[:, number] / on_video[:, number].sum(1, keepdim=True)
        torch.testing.assert_close(torch.tensor(record["maps"]), relative, atol=0.006, rtol=0)
        assert [len(layer) for layer in record["says"]] == [4] * 3
        said = [record["words"][word] for word in record["says"][1]]
        assert said == [tokenizer.decode([token]).strip() for token in lens.ids[0, 1, 4 * number : 4 * number + 4, 0]]
        assert f"Attention maps over frame {number + 1} of 3" in html
