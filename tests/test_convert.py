"""Conversion of LLaVA-lineage checkpoints: logits as computed from the source tensors, in every layout."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from families import IMAGE_SIZE
from forked import run_forked
from forks import TEXT, VOCABULARY, Fork, random_ids
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

import dyvte
from dyvte.conversion.checkpoint import VICUNA_SYSTEM, convert
from dyvte.conversion.downsample import join_neighbours
from dyvte.conversion.tokenizer import read_tokenizer
from dyvte.conversion.weights import Entry, StoredTensor, WeightFile, write_shards
from dyvte.convert import name_positional
from dyvte.errors import ConfigError, ModelError
from dyvte.instrument.views import view

CASES = {
    "llava-1.5": ("clip", "mlp2x_gelu", "llava", "bin", IMAGE_SIZE),
    "llava-1.5-safetensors": ("clip", "mlp2x_gelu", "llava", "safetensors", IMAGE_SIZE),
    "vila-1.0": ("clip", "linear", "llava_with_tower", "bin", IMAGE_SIZE),
    "vila-1.5": ("siglip", "mlp_downsample", "vila", "safetensors", IMAGE_SIZE),
    "vila-1.5-odd": ("siglip", "mlp_downsample", "vila", "safetensors", 10),
    "internvl-chat": ("intern_vit", "mlp2x_gelu", "llava_with_tower", "bin", IMAGE_SIZE),
}


def fork(folder: Path, case: str = "llava-1.5", **config: object) -> Fork:
    kind, projector, layout, files, size = CASES[case]
    return Fork(folder, kind, projector, layout, files, size, **config)


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_source(case: str, tmp_path: Path) -> None:
    source = fork(tmp_path / "source", case)
    target = convert(source.folder, tmp_path / "target")
    mllm = dyvte.load(target, device="cpu")
    size = CASES[case][4]
    pixels = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(5))
    ids = [*random_ids(0, 4), -200, *random_ids(1, 6)]
    expected = source.logits(ids, pixels)
    num_visual = len(expected) - len(ids) + 1
    assert mllm.model.config.image_seq_length == num_visual
    input_ids = [*ids[:4], *[mllm.image_token_id] * num_visual, *ids[5:]]
    batch = mllm.batch(input_ids=torch.tensor([input_ids]), pixel_values=pixels)
    with torch.no_grad():
        logits = mllm.model(**batch).logits[0]
    torch.testing.assert_close(logits[:, :VOCABULARY], expected, atol=2e-5, rtol=1e-5)
    # The placeholder that was added is never the answer.
    assert (logits[:, VOCABULARY:].max(-1).values < logits[:, :VOCABULARY].max(-1).values).all()


@pytest.mark.parametrize("case", ["llava-1.5", "vila-1.5-odd", "internvl-chat"])
def test_the_folder_has_all_that_commands_need(case: str, tmp_path: Path) -> None:
    source = fork(tmp_path / "source", case)
    target = convert(source.folder, tmp_path / "target")
    mllm = dyvte.load(target, device="cpu")
    image = Image.new("RGB", (13, 7), (200, 30, 60))
    batch = mllm.encode([image, None], ["what color ?", "what ?"], answers=["red", "blue"])
    assert batch.layout.visual.sum(1).tolist() == [mllm.model.config.image_seq_length, 0]
    assert batch.layout.answer.sum(1).tolist() == [2, 2]
    text = mllm._prompt("what color ?", ["image"])
    assert text == f"<s>{VICUNA_SYSTEM} USER: <image>\nwhat color ? ASSISTANT:"
    # pad: the image becomes a square with the mean colour around it
    mean = torch.tensor(mllm.processor.image_processor.image_mean)
    std = torch.tensor(mllm.processor.image_processor.image_std)
    corner = batch["pixel_values"][0, :, 0, 0] * std + mean
    torch.testing.assert_close(corner, (mean * 255).int() / 255, atol=2e-2, rtol=0)
    with dyvte.FixedExit(1)(mllm):
        assert len(mllm.generate(mllm.encode([image], ["what color ?"]), max_new_tokens=3)) == 1


def test_maps_of_downsampled_tokens_lie_over_the_image(tmp_path: Path) -> None:
    """A bright patch shows up where it is, although the tokens run down the columns."""
    source = fork(tmp_path / "source", "vila-1.5")
    mllm = dyvte.load(convert(source.folder, tmp_path / "target"), device="cpu")
    pixels = torch.zeros(1, 4, 4, 32)
    pixels[0, 0, 2:] = 1  # of 4 x 4 patches, those at the top right
    tokens = join_neighbours(pixels.flatten(1, 2))[0].sum(-1)
    place = view(mllm, mllm.encode([Image.new("RGB", (8, 8))], ["what ?"]))
    assert place is not None
    assert (place.arrange(tokens) > 0).tolist() == [[False, True], [False, False]]


def test_transformers_alone_loads_the_folder(tmp_path: Path) -> None:
    source = fork(tmp_path / "source", "internvl-chat")
    target = convert(source.folder, tmp_path / "target")
    model, report = AutoModelForImageTextToText.from_pretrained(target, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert AutoProcessor.from_pretrained(target).image_token_id == model.config.image_token_id


def test_types_shards_and_memory(tmp_path: Path) -> None:
    source = fork(tmp_path / "source")
    target = convert(source.folder, tmp_path / "target", dtype="bfloat16", shard_gigabytes=3e-5)
    index = json.loads((target / "model.safetensors.index.json").read_text())
    files = sorted(target.glob("model-*.safetensors"))
    assert len(files) > 3
    assert {file.name for file in files} == set(index["weight_map"].values())
    assert index["metadata"]["total_size"] == sum(
        WeightFile(file).read(name).nbytes for file in files for name in WeightFile(file).tensors()
    )
    assert dyvte.load(target, device="cpu").dtype == torch.bfloat16


def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path) -> None:
    alive = [0, 0]  # now, most

    class Counted(WeightFile):
        def read(self, name: str) -> torch.Tensor:
            tensor = torch.full((1000,), float(name))
            storage = tensor.untyped_storage()
            alive[0] += 1
            alive[1] = max(alive)
            import weakref

            weakref.finalize(storage, lambda: alive.__setitem__(0, alive[0] - 1))
            return tensor

    file = Counted(tmp_path / "none")
    stored = [StoredTensor(file, str(i), (1000,), torch.float32) for i in range(20)]
    entries = [Entry(f"t{each.name}", each.shape, each.dtype, each) for each in stored]
    assert sum(write_shards(tmp_path, entries, 10_000)) == 20 * 4000
    assert alive[1] == 1
    with safe_open(tmp_path / "model-00007-of-00010.safetensors", framework="pt") as out:
        assert torch.equal(out.get_tensor("t13"), torch.full((1000,), 13.0))


SHARD = 150 * 2**20
"""Bytes of each of the three weight files of `large_checkpoint`."""

MEASURE = """
import resource, sys
from dyvte.convert import convert

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

small, large, target = sys.argv[1:]
convert(small, target + "-small")  # everything that is imported on the way is in memory now
before = peak()
convert(large, target)
print("grown", peak() - before)
"""


def large_checkpoint(small: Fork, folder: Path) -> None:
    """A checkpoint like `small` with embedding, head and layer of `SHARD` bytes each, all zeros that take no disk."""
    width = TEXT["hidden_size"]
    rows, inner = SHARD // (2 * width), SHARD // (2 * width * 3)
    config = json.loads((small.folder / "config.json").read_text())
    changed = {"vocab_size": rows, "intermediate_size": inner, "num_hidden_layers": 1}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**config, **changed}))
    for file in small.folder.glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    shutil.copytree(small.folder / "tower", folder / "tower")
    shapes = {name: tuple(each.shape) for name, each in small.text.items() if ".layers." not in name}
    shapes |= {name: tuple(each.shape) for name, each in small.text.items() if ".layers.0." in name}
    for name in shapes:
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            shapes[name] = (rows, width)
        if name.endswith(("gate_proj.weight", "up_proj.weight")):
            shapes[name] = (inner, width)
        if name.endswith("down_proj.weight"):
            shapes[name] = (width, inner)
    projector = {f"model.mm_projector.{name}": tuple(each.shape) for name, each in small.projector.items()}
    of_file = {"embed": {}, "head": {}, "rest": projector}
    for name, shape in shapes.items():
        part = "embed" if "embed_tokens" in name else "head" if "lm_head" in name else "rest"
        of_file[part][name] = shape
    index = {}
    for number, part in enumerate(of_file.values(), start=1):
        name = f"model-{number:05d}-of-00003.safetensors"
        write_zeros(folder / name, part)
        index |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def write_zeros(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        out.truncate(8 + len(text) + end)


def test_peak_memory_is_under_one_shard_and_a_gibibyte(tmp_path: Path) -> None:
    """Three shards and the three that are written are 900 MiB: what is asked for here is stricter."""
    small = fork(tmp_path / "small", "llava-1.5-safetensors")
    large_checkpoint(small, tmp_path / "large")
    target = tmp_path / "target"
    command = [sys.executable, "-c", MEASURE, str(small.folder), str(tmp_path / "large"), str(target)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    size = sum(file.stat().st_size for file in target.glob("*.safetensors"))
    assert size > 3 * SHARD * 0.99
    grown = int(done.stdout.split("grown")[-1])
    assert grown < 1.5 * SHARD < SHARD + 2**30
    shutil.rmtree(target)  # pytest keeps the folders of some runs


def test_command_line(tmp_path: Path) -> None:
    source = fork(tmp_path / "source", image_aspect_ratio=None)
    done = run_forked("dyvte.convert", [str(source.folder), str(tmp_path / "my target"), "dtype=float16"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "3 decoder layers, 16 visual tokens" in done.stdout
    assert sorted(each.name for each in tmp_path.iterdir()) == ["my target", "source"]
    with pytest.raises(ConfigError, match="exists: give another target, or overwrite=true"):
        convert(source.folder, tmp_path / "my target")
    assert name_positional(["a b", "c", "x=1", "--help"]) == ['source="a b"', 'target="c"', "x=1", "--help"]


def test_a_conversion_that_fails_leaves_nothing(tmp_path: Path) -> None:
    source = fork(tmp_path / "source", "vila-1.5")
    (source.folder / "mm_projector" / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ModelError, match="not a safetensors file that can be read"):
        convert(source.folder, tmp_path / "target")
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("overwrite", [True, False])
def test_conversions_into_one_folder_at_once_leave_a_whole_one(overwrite: bool, tmp_path: Path) -> None:
    sources = [fork(tmp_path / f"source-{number}", "llava-1.5-safetensors") for number in range(3)]
    for number, source in enumerate(sources):  # tell them apart by their projector
        file = source.folder / "config.json"
        weights = {f"model.mm_projector.{name}": each + number for name, each in source.projector.items()}
        save_file(weights, source.folder / "projector.safetensors")
        index = source.folder / "model.safetensors.index.json"
        content = json.loads(index.read_text())
        content["weight_map"] |= dict.fromkeys(weights, "projector.safetensors")
        index.write_text(json.dumps(content))
        file.write_text(json.dumps({**json.loads(file.read_text()), "max_position_embeddings": 500 + number}))
    target, barrier = tmp_path / "target", threading.Barrier(3)

    def job(source: Fork) -> bool:
        barrier.wait()
        try:
            convert(source.folder, target, overwrite=overwrite)
        except ConfigError as error:
            return "exists" not in str(error)
        return True

    with ThreadPoolExecutor(3) as pool:
        done = list(pool.map(job, sources))
    assert sum(done) == (3 if overwrite else 1)
    winner = json.loads((target / "config.json").read_text())["text_config"]["max_position_embeddings"] - 500
    with safe_open(target / "model.safetensors", framework="pt") as file:
        bias = file.get_tensor("model.multi_modal_projector.linear_1.bias")
    assert torch.equal(bias, sources[0].projector["0.bias"] + winner)
    assert {each.name for each in tmp_path.iterdir()} == {"target", *(source.folder.name for source in sources)}


OUTSIDE = ["../other", "/etc", "~", "sub/../../other", "..", "here"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_tower_that_the_config_names_outside_is_read_only_if_the_user_names_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = fork(tmp_path / "source")
    monkeypatch.chdir(tmp_path)
    for other in ("other", "here"):
        shutil.copytree(source.folder / "tower", tmp_path / other)
    file = source.folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "mm_vision_tower": name}))
    with pytest.raises(ModelError, match=r"source/config\.json names a vision tower outside .*vision_tower="):
        convert(source.folder, tmp_path / "target")
    assert convert(source.folder, tmp_path / "target", vision_tower=str(tmp_path / "other")).is_dir()


REFUSED = {
    "anyres": ({"image_aspect_ratio": "anyres"}, "llava-hf/llava-v1.6"),
    "dynamic": ({"image_aspect_ratio": "dynamic"}, "export its visual tokens"),
    "s2": ({"s2": True}, "export its visual tokens"),
    "several towers": ({"mm_vision_tower": "clip;convnext"}, "several vision towers"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_conversion_is_named(case: str, tmp_path: Path) -> None:
    source = fork(tmp_path / "source")
    changes, message = REFUSED[case]
    config = json.loads((source.folder / "config.json").read_text())
    (source.folder / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ModelError, match=message):
        convert(source.folder, tmp_path / "target")


def test_wrong_sources_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is neither a folder nor can it be downloaded"):
        convert(tmp_path / "nowhere", tmp_path / "target")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"config\.json is missing"):
        convert(tmp_path / "empty", tmp_path / "target")
    source = fork(tmp_path / "source")
    file = source.folder / "config.json"
    config = json.loads(file.read_text())
    for changes, message in (
        ({"mm_projector_type": "mlp3x_gelu"}, "'mlp3x_gelu' is not one of linear, mlp2x_gelu, mlp_downsample"),
        ({"hidden_size": 32}, r"has shape \(110, 64\); the configs ask for \(111, 32\)"),
        ({"architectures": ["LlavaMptForCausalLM"], "model_type": "llava_mpt"}, "neither Llama, Mistral nor Qwen2"),
        ({"mm_vision_tower": "nobody/nothing"}, "neither a folder nor can it be downloaded"),
        ({"text_config": {}, "vision_config": {}}, "in the format of transformers already"),
    ):
        file.write_text(json.dumps({**config, **changes}))
        with pytest.raises(ModelError, match=message):
            convert(source.folder, tmp_path / "target")
    file.write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="choose float16, bfloat16 or float32"):
        convert(source.folder, tmp_path / "target", dtype="half")
    (source.folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="no tokenizer"):
        convert(source.folder, tmp_path / "target")


def test_a_pickle_that_runs_code_is_not_opened(tmp_path: Path) -> None:
    import pickle

    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return print, ("boom",)

    source = fork(tmp_path / "source")
    (source.folder / "pytorch_model-00002-of-00003.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ModelError, match="not a file of weights alone"):
        convert(source.folder, tmp_path / "target")


def test_tokenizer_from_a_sentencepiece_model(tmp_path: Path) -> None:
    """Llama's `tokenizer.model` is read without the sentencepiece package."""
    from transformers.convert_slow_tokenizer import import_protobuf

    proto = import_protobuf().ModelProto()
    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    pieces += [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]
    words = ["▁r", "ed", "▁red", "▁", "r", "e", "d", "\n"]
    pieces += [(word, -float(index), 1) for index, word in enumerate(words)]
    for piece, score, kind in pieces:
        added = proto.pieces.add()
        added.piece, added.score, added.type = piece, score, kind
    (tmp_path / "tokenizer.model").write_bytes(proto.SerializeToString())
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<im_start>": len(pieces)}))
    tokenizer = read_tokenizer(tmp_path)
    ids = {word: 259 + index for index, word in enumerate(words)}
    assert tokenizer("red")["input_ids"] == [1, ids["▁red"]]
    assert tokenizer("é", add_special_tokens=False)["input_ids"] == [ids["▁"], 3 + 0xC3, 3 + 0xA9]
    # Text behind a special token gets SentencePiece's leading space, as the code base tokenizes it on its own.
    after = tokenizer("<im_start>\nred", add_special_tokens=False)["input_ids"]
    assert after[:2] == [len(pieces), ids["▁"]]
    assert tokenizer.eos_token_id == 2
