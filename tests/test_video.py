"""Videos: frames are visual tokens, for roles, probe, exits, policies and the share of attention of each frame."""

from __future__ import annotations

import importlib.util
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import families
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import pyplot as plt
from naive import masked_forward
from PIL import Image
from torch import Tensor

import analysis.exits
import dyvte
from dyvte.batch import Batch
from dyvte.data.base import image_numbers
from dyvte.data.chat import split_chat
from dyvte.data.huggingface import HuggingFaceDataset
from dyvte.data.llava_json import LlavaJsonDataset
from dyvte.data.video import Video, read_video
from dyvte.errors import BrokenSample, ConfigError, ModelError
from dyvte.layout import INSTRUCTION, TokenLayout
from dyvte.mllm import MLLM
from dyvte.runs.config import compose

LAYERS = 4
EXACT = 1e-4
MERGED = 4
"""Patches of Qwen-VL that become one visual token."""


def words(generator: torch.Generator, length: int) -> list[int]:
    return torch.randint(families.FIRST_TEXT, families.LAST_TEXT, (length,), generator=generator).tolist()


Blocks = list[tuple[list[int], bool]]
"""Ids one behind the other, and whether their placeholders are a frame's."""


def film(mllm: MLLM, steps: int, generator: torch.Generator) -> tuple[Blocks, dict[str, Tensor]]:
    """Placeholders of a video, frame by frame with what stands between frames, and its inputs."""
    if mllm.model.config.model_type == "llava_onevision":
        pixels = torch.randn(1, steps, 3, 4, 4, generator=generator)
        per_frame = mllm.model.get_video_features(pixels, vision_feature_layer=-1).pooler_output.shape[1] // steps
        blocks: Blocks = [([families.VIDEO_TOKEN] * per_frame, True) for _ in range(steps)]
        return [*blocks, ([families.VIDEO_TOKEN], False)], {"pixel_values_videos": pixels}
    grid = torch.tensor([[steps, 4, 4]])
    pixels = torch.randn(int(grid.prod()), 3 * families.PATCH_SIZE**2, generator=generator)
    frames = [[families.VIDEO_TOKEN] * (16 // MERGED) for _ in range(steps)]
    start, end = families.VISION_START, families.VISION_END
    if mllm.model.config.model_type == "qwen3_vl":  # the time stands before each frame
        blocks = [([*words(generator, 2), start, *each, end], True) for each in frames]
    else:
        blocks = [([start], False), *[(each, True) for each in frames], ([end], False)]
    return blocks, {"pixel_values_videos": pixels, "video_grid_thw": grid}


@torch.no_grad()
def video_batch(mllm: MLLM, steps: tuple[int, ...], seed: int = 0) -> tuple[Batch, list[list[int]]]:
    """Prompts about a video each, padded on the left; also the frame of every position, -1 for none."""
    generator = torch.Generator().manual_seed(seed)
    rows, frames, inputs = [], [], []
    for row, number in enumerate(steps):
        blocks, of_film = film(mllm, number, generator)
        before, after = words(generator, 3), words(generator, 5 + 2 * row)
        which = np.cumsum([is_frame for _, is_frame in blocks]) - 1
        rows.append([*before, *[each for block, _ in blocks for each in block], *after])
        of_blocks = [
            frame if each == families.VIDEO_TOKEN and is_frame else -1
            for (block, is_frame), frame in zip(blocks, which.tolist(), strict=True)
            for each in block
        ]
        frames.append([*[-1] * len(before), *of_blocks, *[-1] * len(after)])
        inputs.append(of_film)
    length = max(map(len, rows))
    ids = torch.tensor([[families.PAD] * (length - len(row)) + row for row in rows])
    frames = [[-1] * (length - len(row)) + row for row in frames]
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    merged = {name: torch.cat([each[name] for each in inputs]) for name in inputs[0]}
    if "video_grid_thw" in merged:
        merged["mm_token_type_ids"] = 2 * (ids == families.VIDEO_TOKEN).int()
    return mllm.batch(input_ids=ids, attention_mask=mask, **merged), frames


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=EXACT, rtol=0)


def steps_for(family: str) -> tuple[int, ...]:
    """Of two rows; LLaVA-OneVision takes videos of one length."""
    return (3, 3) if family == "llava_onevision" else (3, 2)


VIDEO_FAMILIES = ("qwen2_5_vl", "qwen3_vl", "llava_onevision")


@pytest.mark.parametrize("family", VIDEO_FAMILIES)
@torch.no_grad()
def test_frames_are_visual_tokens(family: str) -> None:
    mllm = families.FAMILIES[family](num_layers=LAYERS)
    batch, frames = video_batch(mllm, steps_for(family))
    assert torch.equal(batch.layout.visual, batch["input_ids"] == families.VIDEO_TOKEN)
    assert dyvte.frame_numbers(mllm, batch).tolist() == frames
    plain = mllm.model(**batch).logits
    with dyvte.AttentionProbe(mllm) as probe:
        assert torch.equal(mllm.model(**batch).logits, plain)
    assert (probe.stats.curve("cross") > 0).all()
    sweep = dyvte.exit_sweep(mllm, batch)
    last = batch.layout.last_prompt
    for k in (0, 2, LAYERS):
        expected = masked_forward(mllm, batch, k).logits[torch.arange(2), last]
        with dyvte.FixedExit(k)(mllm):
            close(mllm.model(**batch).logits[torch.arange(2), last], expected)
        close(sweep.logits[:, k], expected)


@pytest.mark.parametrize("family", VIDEO_FAMILIES)
@torch.no_grad()
def test_policies_take_tokens_of_videos_out(family: str) -> None:
    """What is left is as if the others were hidden; frames that a policy keeps evenly stay evenly."""
    mllm = families.FAMILIES[family](num_layers=LAYERS)
    batch, _ = video_batch(mllm, steps_for(family))
    rows, last = torch.arange(2), batch.layout.last_prompt
    for layer, policy in ((1, dyvte.FastV(layer=1, keep=0.5)), (0, dyvte.UniformDrop(layer=0, keep=0.5))):
        with policy(mllm) as run:
            found = mllm.model(**batch).logits[rows, last]
        assert run.prefill is not None
        stayed = run.prefill.kept & batch.layout.visual
        assert stayed.any(1).all()
        assert (stayed.sum(1) < batch.layout.visual.sum(1)).all()
        gone = Batch(dict(batch), TokenLayout(batch.layout.roles.masked_fill(stayed, INSTRUCTION)))
        close(found, masked_forward(mllm, gone, layer).logits[rows, last])
    frames = dyvte.frame_numbers(mllm, batch)[0]
    of_frames = frames[stayed[0] & (frames >= 0)].bincount()
    assert of_frames.amax() - of_frames.amin() <= 1
    with dyvte.FixedExit(1)(mllm):
        cached = mllm.generate(batch, max_new_tokens=3)
        assert mllm.generate(batch, max_new_tokens=3, use_cache=False) == cached


@settings(max_examples=5)
@given(seed=st.integers(0, 99), silent=st.booleans())
def test_shares_add_what_frames_receive(seed: int, silent: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    received = torch.rand(2, 3, 4, 9, generator=generator)
    received[:, 0, 3] = torch.nan  # a layer with fewer heads
    if silent:
        received[:, 1] = torch.nan
    frames = torch.tensor([[-1, 0, 0, -1, 1, 1, 2, -1, -1], [-1, -1, 0, 0, 0, 1, 1, 1, -1]])
    shares = dyvte.frame_shares(received, frames)
    assert shares.shape == (2, 3, 3)
    assert shares[1, :, 2].isnan().all()
    for row in range(2):
        for layer in range(3):
            sums = [0.0] * (3 - row)
            for head in range(4):
                for position, frame in enumerate(frames[row].tolist()):
                    value = float(received[row, layer, head, position])
                    if frame >= 0 and value == value:
                        sums[frame] += value
            if silent and layer == 1:
                assert shares[row, layer].isnan().all()
            else:
                close(shares[row, layer, : len(sums)], torch.tensor(sums) / sum(sums))


@torch.no_grad()
def test_a_frame_that_is_looked_at_has_the_share() -> None:
    """Shares are of the probabilities that eager attention gives the last token, layer by layer."""
    mllm = families.FAMILIES["qwen2_5_vl"](num_layers=2)
    batch, frames = video_batch(mllm, (3, 2))
    with dyvte.AttentionProbe(mllm) as probe:
        mllm.model(**batch)
    shares = dyvte.frame_shares(probe.stats.received_last, dyvte.frame_numbers(mllm, batch))
    mllm.model.set_attn_implementation("eager")
    maps = mllm.model(**batch, output_attentions=True).attentions
    mllm.model.set_attn_implementation("sdpa")
    for layer, of_layer in enumerate(maps):
        on_frames = [[float(of_layer[0, :, -1, torch.tensor(frames[0]) == f].sum()) for f in range(3)]]
        close(shares[0, layer], torch.tensor(on_frames[0]) / sum(on_frames[0]))


def test_images_of_a_prompt_are_frames() -> None:
    mllm = families.FAMILIES["qwen2_5_vl"](num_layers=2)
    batch = families.random_batch(mllm, torch.Generator().manual_seed(0), num_images=(2, 1))
    numbers = dyvte.frame_numbers(mllm, batch)
    assert numbers.amax(1).tolist() == [1, 0]
    assert torch.equal(numbers >= 0, batch.layout.visual)


def test_frames_are_spread_evenly() -> None:
    assert read_video(list(range(10)), 4) == [0, 3, 6, 9]
    assert read_video([7], 4) == [7]
    with pytest.raises(BrokenSample, match="has no frames"):
        read_video([], 4)
    with pytest.raises(ConfigError, match="give 1 or more"):
        read_video([1], 0)


def test_files_need_a_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    film = tmp_path / "cat.mp4"
    with pytest.raises(BrokenSample, match=r"'.*cat\.mp4' not found"):
        read_video(film, 4)
    film.write_bytes(b"no video")
    chat = [{"role": "user", "content": [{"type": "video", "video": str(film)}]}]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install av") as told:
        split_chat(chat)
    assert "\n" not in str(told.value)


def test_files_are_read_through_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    class Metadata:
        total_num_frames, fps = 9, 2.0

    def load(video: str, backend: str, sample_indices_fn: Any) -> tuple[np.ndarray, None]:
        asked.update(video=video, backend=backend)
        return np.array(sample_indices_fn(Metadata(), fps=None)), None

    film = tmp_path / "cat.mp4"
    film.write_bytes(b"a video")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name == "av" else None)
    monkeypatch.setattr("transformers.video_utils.load_video", load)
    assert read_video(film, 3).tolist() == [0, 4, 8]
    assert asked == {"video": str(film), "backend": "pyav"}
    assert read_video(film, 3, between=(0.6, 3.4)).tolist() == [2, 4, 6]
    assert read_video(film, 9, between=(3.0, None)).tolist() == [6, 7, 8]
    assert read_video(film, 2, between=(None, 9.0)).tolist() == [0, 8]
    with pytest.raises(BrokenSample, match=r"here: .*no frame between 2\.1 and 2\.2 seconds"):
        read_video(film, 3, "here", (2.1, 2.2))
    with pytest.raises(BrokenSample, match="by time"):
        read_video([1, 2, 3], 3, between=(1.0, None))
    monkeypatch.setattr("transformers.video_utils.load_video", lambda *_, **__: 1 / 0)
    with pytest.raises(BrokenSample, match="unreadable"):
        read_video(film, 3)


# ---------------------------------------------------------------------------- data


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), (value, 0, 0)).save(buffer, format="png")
    return buffer.getvalue()


def reds(video: Any) -> list[int]:
    """What tells frames apart."""
    assert isinstance(video, Video)
    return [frame.getpixel((0, 0))[0] for frame in video.frames]


@pytest.fixture
def frames(tmp_path: Path) -> list[str]:
    names = [f"{number}.png" for number in range(7)]
    for number, name in enumerate(names):
        (tmp_path / name).write_bytes(png(number))
    return names


def test_a_record_names_a_video_or_its_frames(
    tmp_path: Path, frames: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "film.mp4").write_bytes(b"a film")
    films = [frames, "film.mp4", [frames[0], "no.png"], "no.mp4", 7, [], [3], frames]
    lines = [{"question_id": str(row), "text": "<video>\nwhat ?", "video": film} for row, film in enumerate(films)]
    lines[-1]["image"] = "0.png"
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(line) for line in [*lines, {**lines[0], "video": None}]))
    data = LlavaJsonDataset(str(tmp_path / "a.jsonl"), str(tmp_path), max_frames=3)
    assert reds(data[0].image) == [0, 3, 6]
    assert (data[0].question, data[0].picture) == ("what ?", None)
    assert image_numbers([data[0], data[0]]) == [0, 0]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"a\.jsonl line 2: video '.*film\.mp4' needs a package that decodes videos"):
        data[1]
    for row, why in {
        2: "image 'no.png' not found",
        3: "video 'no.mp4' not found",
        4: "'video' must be a file name",
        6: "a frame must be a file name",
        7: "names an image and a video",
        8: "no video is named",
    }.items():
        with pytest.raises(BrokenSample, match=f"line {row + 1}: .*{why}"):
            data[row]


def test_a_column_holds_videos(tmp_path: Path, frames: list[str]) -> None:
    import datasets

    rows = {"question": ["what ?"] * 2, "film": [frames, [frames[1]]]}
    datasets.Dataset.from_dict(rows).to_json(tmp_path / "names.jsonl")
    stored = [[{"bytes": png(int(name[0])), "path": None} for name in row] for row in rows["film"]]
    feature = datasets.Features({"question": datasets.Value("string"), "film": datasets.List(datasets.Image())})
    datasets.Dataset.from_dict({**rows, "film": stored}, features=feature).to_parquet(tmp_path / "stored.parquet")
    for file in ("names.jsonl", "stored.parquet"):
        columns = {"question": "question", "video": "film"}
        data = HuggingFaceDataset(str(tmp_path / file), columns, image_folder=str(tmp_path), max_frames=2)
        assert [reds(sample.image) for sample in data] == [[0, 6], [1]]
        assert data[0].image_id != data[1].image_id


class FilmProcessor:
    """Turns frames into the inputs of a small random Qwen2.5-VL, as its own processor would."""

    chat_template = "there is one"
    video_processor = object()
    image_token_id = families.IMAGE_TOKEN

    def __init__(self) -> None:
        self.tokenizer = families._tokenizer({"V": families.VIDEO_TOKEN})
        self.seen: list[Any] = []

    def apply_chat_template(self, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        asked = "".join("V" if part["type"] == "video" else part["text"] for part in messages[0]["content"])
        return asked if len(messages) == 1 else f"{asked} {messages[1]['content'][0]['text']}"

    def __call__(self, text: list[str], videos: list[list[Image.Image]], **_: Any) -> dict[str, Tensor]:
        self.seen = videos
        grid = torch.tensor([[len(film), 4, 4] for film in videos])
        lines = []
        for prompt, film in zip(text, videos, strict=True):
            film_ids = [families.VISION_START, *[families.VIDEO_TOKEN] * (len(film) * 16 // MERGED)]
            lines.append(
                [families.FIRST_TEXT, *film_ids, *[families.FIRST_TEXT + ord(each) % 9 for each in prompt[1:]]]
            )
        length = max(map(len, lines))
        ids = torch.tensor([[families.PAD] * (length - len(line)) + line for line in lines])
        shades = [(16 * len(film), float(sum(reds(Video(tuple(film)))))) for film in videos]
        pixels = torch.cat([torch.full((count, 3 * families.PATCH_SIZE**2), shade) for count, shade in shades])
        return {
            "input_ids": ids,
            "attention_mask": (ids != families.PAD).long(),
            "pixel_values_videos": pixels,
            "video_grid_thw": grid,
            "mm_token_type_ids": 2 * (ids == families.VIDEO_TOKEN).int(),
        }


@torch.no_grad()
def test_questions_about_videos_go_through_encode(tmp_path: Path, frames: list[str]) -> None:
    """As questions about images do: so commands need to know nothing of videos."""
    lines = [{"question_id": str(row), "text": "what ?" * (row + 1), "video": frames[row:]} for row in range(2)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    samples = list(LlavaJsonDataset(str(tmp_path / "a.jsonl"), str(tmp_path), max_frames=3))
    mllm = families.FAMILIES["qwen2_5_vl"](num_layers=2)
    blind = MLLM(mllm.model, SimpleNamespace(chat_template="", tokenizer=SimpleNamespace(bos_token=None)))
    mllm = MLLM(mllm.model, FilmProcessor())
    batch = mllm.encode([each.image for each in samples], [each.question for each in samples])
    assert [reds(Video(tuple(film))) for film in mllm.processor.seen] == [[0, 3, 6], [1, 3, 6]]
    assert dyvte.frame_numbers(mllm, batch).amax(1).tolist() == [2, 2]
    sweep = dyvte.exit_sweep(mllm, batch)
    for k in range(3):
        close(sweep.logits[:, k], masked_forward(mllm, batch, k).logits[:, -1])
    with pytest.raises(ModelError, match="reads no videos"):
        blind._processed(["V"], [[]], "left", [[samples[0].image]])


def test_a_command_is_about_videos(tmp_path: Path, frames: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is missing costs its row; the others are measured, row by row as images are."""
    films = [frames[row:] for row in (0, 0, 2, 3)]
    lines = [{"question_id": str(row), "text": "what ?", "video": film} for row, film in enumerate([*films, "no.mp4"])]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    mllm = MLLM(families.FAMILIES["qwen2_5_vl"](num_layers=2).model, FilmProcessor())
    monkeypatch.setattr("dyvte.loading.load", lambda *_, **__: mllm)
    monkeypatch.setattr("dyvte.runs.store.RunFolder.save_figure", lambda self, name, figure: plt.close(figure))
    monkeypatch.chdir(tmp_path)
    chosen = ["model=hf", "model.path=somewhere", "device=cpu", "batch_size=2", "output_dir=exits"]
    data = ["data=llava_json", "data.file=a.jsonl", "data.max_frames=3"]
    quick = ["bootstrap=20", "permutations=19", "captions=0", "max_new_tokens=2", "accuracy=false"]
    analysis.exits.main(compose("exits", [*chosen, *data, *quick]))
    summary = json.loads(Path("exits/summary.json").read_text())
    assert (summary["num_samples"], summary["num_failed"]) == (4, 1)
    samples = list(LlavaJsonDataset("a.jsonl", max_frames=3, limit=4))
    batch = mllm.encode([each.image for each in samples], [each.question for each in samples])
    expected = dyvte.exit_sweep(mllm, batch).logits.log_softmax(-1)
    kl = (expected.exp() * (expected - expected[:, -1:])).sum(-1).mean(0)
    torch.testing.assert_close(torch.tensor(summary["kl"]), kl, atol=EXACT, rtol=0)
