"""Every source gives the same kind of sample, and names what is broken by file and line."""

from __future__ import annotations

import base64
import io
import json
import string
import unicodedata
from pathlib import Path

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from PIL import Image

from dyvte.data import BrokenSample, Dataset, build_dataset
from dyvte.data.base import image_numbers, unique_ids
from dyvte.data.huggingface import HuggingFaceDataset
from dyvte.data.llava_json import LlavaJsonDataset
from dyvte.data.metrics import exact_match
from dyvte.data.reading import PLACEHOLDERS, read_answers, read_image, read_question, to_rgb
from dyvte.data.shapes import ShapesDataset
from dyvte.errors import ConfigError, DataError
from dyvte.runs.config import compose


def png(colour: tuple[int, int, int] = (255, 0, 0)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), colour).save(buffer, "png")
    return buffer.getvalue()


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "red.png").write_bytes(png())
    (folder / "truncated.png").write_bytes(png()[:40])
    (folder / "text.png").write_text("no image")
    return folder


def conversation(name: str, *turns: str, image: str | None = "red.png") -> dict:
    speakers = ("human", "gpt")
    record = {"id": name, "conversations": [{"from": speakers[i % 2], "value": v} for i, v in enumerate(turns)]}
    return record if image is None else {**record, "image": image}


def broken(data: Dataset, index: int) -> str:
    with pytest.raises(BrokenSample) as caught:
        data[index]
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---------------------------------------------------------------- shapes
def test_shapes_are_a_function_of_their_arguments():
    once, again, other = ShapesDataset(limit=20), ShapesDataset(limit=20), ShapesDataset(limit=20, seed=1)
    assert once.fingerprint == again.fingerprint != other.fingerprint
    for first, second in zip(once, again, strict=True):
        assert first.image is not None
        assert second.image is not None
        assert first.image.tobytes() == second.image.tobytes()
        assert (first.id, first.question, first.answer) == (second.id, second.question, second.answer)


def test_shapes_limit_takes_a_prefix():
    long, short = ShapesDataset(limit=30), ShapesDataset(limit=9)
    assert [s.id for s in short] == [s.id for s in long][:9]


def test_shapes_samples_carry_kind_and_image_for_grouping():
    samples = list(ShapesDataset(limit=60, kinds=["attribute", "two_hop"]))
    assert {s.kind for s in samples} == {"attribute", "two_hop"}
    assert {s.metadata["hops"] for s in samples} == {1, 3}
    assert len({s.id for s in samples}) == 60
    pixels: dict[str, set[bytes]] = {}
    for sample in samples:
        assert sample.image is not None
        pixels.setdefault(sample.image_id, set()).add(sample.image.tobytes())
    assert len(pixels) < 60  # questions do share images
    assert all(len(each) == 1 for each in pixels.values())


@pytest.mark.parametrize("arguments", [{"split": "nowhere"}, {"kinds": ["riddle"]}, {"limit": 0}])
def test_shapes_refuse_what_does_not_exist(arguments):
    with pytest.raises(ConfigError):
        ShapesDataset(**arguments)


# ---------------------------------------------------------------- LLaVA files
def test_training_json(tmp_path: Path, images: Path):
    records = [
        conversation("a", "<image>\nWhat is it?", "A square.", "Which colour?", "Red."),
        conversation("b", "Is it red?\n<image>", "Yes"),
        conversation("c", "What is 1 plus 1?", "2", image=None),
    ]
    file = tmp_path / "train.json"
    file.write_text(json.dumps(records))
    first = list(LlavaJsonDataset(str(file), str(images)))
    assert [(s.id, s.question, s.answer) for s in first] == [
        ("a", "What is it?", "A square."),
        ("b", "Is it red?", "Yes"),
        ("c", "What is 1 plus 1?", "2"),
    ]
    assert first[0].image is not None
    assert first[0].image.getpixel((0, 0)) == (255, 0, 0)
    assert first[2].image is None
    assert [s.image_id for s in first] == ["red.png", "red.png", "c"]
    assert [s.id for s in LlavaJsonDataset(str(file), str(images), turns="single")] == ["b", "c"]
    assert [s.id for s in LlavaJsonDataset(str(file), str(images), turns="all")] == ["a", "a#1", "b", "c"]
    assert [s.id for s in LlavaJsonDataset(str(file), str(images), require_image=True)] == ["a", "b"]
    assert [s.id for s in LlavaJsonDataset(str(file), str(images), limit=1)] == ["a"]


def test_evaluation_jsonl(tmp_path: Path, images: Path):
    file = tmp_path / "pope.jsonl"
    lines = [
        {"question_id": 7, "image": "red.png", "text": "Is it red?", "label": "yes", "category": "colour"},
        {"question_id": 8, "image": "red.png", "text": "Why?"},
    ]
    file.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    one, two = LlavaJsonDataset(str(file), str(images))
    assert (one.id, one.answer, one.kind, one.metadata) == ("7", "yes", "colour", {"question_id": 7})
    assert (two.answer, two.kind) == (None, "all")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            {"question_id": 1, "image": "gone.png", "text": "?"},
            "image 'gone.png' not found under IMAGES/ (set data.image_folder)",
        ),
        ({"question_id": 1, "image": "truncated.png", "text": "?"}, "image 'truncated.png' is unreadable"),
        ({"question_id": 1, "image": "text.png", "text": "?"}, "image 'text.png' is unreadable (not an image"),
        ({"question_id": 1, "image": "red.png", "text": "  "}, "the question is empty"),
        ({"question_id": 1, "image": "red.png", "text": 3}, "the question is int, not text"),
        ({"question_id": 1, "image": ["red.png", "red.png"], "text": "?"}, "has 2 images"),
        ({"question_id": 1, "image": 5, "text": "?"}, "'image' must be a file name, not int"),
        ({"question_id": 1, "image": "red.png"}, "must have 'conversations' or 'text'"),
        ({"conversations": []}, "'conversations' must be a list"),
        ({"conversations": [{"from": "gpt", "value": "x"}]}, "'conversations' holds no question"),
        (
            {"conversations": [{"from": "human", "value": "x"}, {"from": "human", "value": "y"}]},
            "must alternate between human and gpt",
        ),
        ([1, 2], "must be a JSON object, not list"),
        ("{'single': quotes}", "not a JSON record"),
        (b'{"text": "\xff"}', "not a JSON record (not UTF-8)"),
    ],
)
def test_broken_lines_are_named_and_leave_the_others_alone(tmp_path: Path, images: Path, line, expected: str):
    good = b'{"question_id": 0, "image": "red.png", "text": "Is it red?"}'
    bad = line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode()
    file = tmp_path / "eval.jsonl"
    file.write_bytes(b"\n".join([good, b"", bad, good]))
    data = LlavaJsonDataset(str(file), str(images))
    message = broken(data, 1)
    assert message.startswith(f"{file} line 3: ")
    assert expected.replace("IMAGES", str(images)) in message
    assert data[0].question == data[2].question == "Is it red?"
    assert [data[0].id, data[2].id] == ["0", "0~2"]  # tables are joined by id


def test_lines_of_a_json_list(tmp_path: Path, images: Path):
    file = tmp_path / "train.json"
    file.write_text(json.dumps([conversation("a", "one", "1"), conversation("b", " ", "2")], indent=2))
    line = 1 + file.read_text().split('"id": "b"')[0].count("\n") - 1  # where the second record opens
    assert broken(LlavaJsonDataset(str(file), str(images)), 1) == f"{file} line {line}: the question is empty"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("[{},\n{]", "line 2 column 2: not JSON"),
        ("[1 2]", "expected ',' or ']'"),
        ("[{}]\n[]", "line 2 column 1: not JSON (text behind the list)"),
        ("[" * 100_000, "not JSON that can be read"),
        ("[]", "holds no question"),
        ("", "holds no question"),
    ],
)
def test_a_file_that_is_no_json_is_refused(tmp_path: Path, content: str, expected: str):
    file = tmp_path / "x.json"
    file.write_text(content)
    with pytest.raises(DataError) as caught:
        LlavaJsonDataset(str(file))
    assert expected in str(caught.value)
    assert str(file) in str(caught.value)


@settings(max_examples=50, derandomize=True, deadline=None)
@given(st.lists(st.tuples(st.text(max_size=5), st.booleans()), min_size=1, max_size=6), st.sampled_from([None, 1, 4]))
def test_json_list_agrees_with_json_loads(tmp_path_factory, texts: list[tuple[str, bool]], indent: int | None):
    records = [conversation(str(i), text, "x", image=None) for i, (text, _) in enumerate(texts)]
    file = tmp_path_factory.mktemp("json") / "list.json"
    file.write_text(json.dumps(records, indent=indent, ensure_ascii=texts[0][1]), encoding="utf-8")
    data = LlavaJsonDataset(str(file))
    assert len(data) == len(texts)
    for index, (text, _) in enumerate(texts):
        stripped = text.strip()
        if stripped:
            assert (data[index].id, data[index].question) == (str(index), stripped)
        else:
            assert "the question is empty" in broken(data, index)


def test_missing_file_says_which_setting():
    with pytest.raises(DataError, match=r"cannot read nowhere\.jsonl: No such file or directory \(set data\.file\)"):
        LlavaJsonDataset("nowhere.jsonl")


# ---------------------------------------------------------------- Hugging Face data sets
@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


ROWS = {
    "picture": [{"bytes": png(), "path": None}, {"bytes": png((0, 0, 9)), "path": None}, {"bytes": b"?", "path": None}],
    "question": ["Is it red?", "Is it red?", "Is it red?"],
    "answers": [["yes", "no", "yes"], ["no"], []],
    "type": ["a", "b", None],
}
COLUMNS = {"image": "picture", "question": "question", "answer": "answers", "kind": "type"}


@pytest.mark.parametrize("image_feature", [True, False])
@pytest.mark.parametrize("source", ["file", "folder", "saved"])
def test_local_data_with_a_column_map(tmp_path: Path, source: str, image_feature: bool):
    table = datasets.Dataset.from_dict(ROWS)
    if image_feature:
        table = table.cast_column("picture", datasets.Image())
    folder = tmp_path / "questions"
    if source == "saved":
        table.save_to_disk(str(folder))
    else:
        folder.mkdir()
        table.to_parquet(folder / "test.parquet")
    data = HuggingFaceDataset(str(folder / "test.parquet" if source == "file" else folder), COLUMNS)
    assert len(data) == 3
    assert (data[0].id, data[0].answer, data[0].kind, data[0].metadata) == (
        "0",
        "yes",
        "a",
        {"answers": ["yes", "no", "yes"]},
    )
    assert data[1].image is not None
    assert data[1].image.getpixel((0, 0)) == (0, 0, 9)
    assert data[0].image_id != data[1].image_id
    assert "row 2: image 'embedded in the row' is unreadable" in broken(data, 2)


def test_image_names_suffix_and_limit(tmp_path: Path, images: Path):
    file = tmp_path / "questions.csv"
    file.write_text("qid,file,q,a\n5,red.png,Is it red?,1\n6,gone.png,Is it?,0\n7,,Why?,0\n")
    columns = {"image": "file", "question": "q", "answer": "a", "id": "qid"}
    data = HuggingFaceDataset(str(file), columns, image_folder=str(images), question_suffix="\nShort, please.")
    assert (data[0].id, data[0].image_id, data[0].answer) == ("5", "red.png", "1")
    assert data[0].question == "Is it red?\nShort, please."
    assert broken(data, 1).endswith(f"row 1: image 'gone.png' not found under {images}/ (set data.image_folder)")
    assert (data[2].image, data[2].image_id) == (None, "7")
    shorter = HuggingFaceDataset(str(file), columns, image_folder=str(images), limit=2)
    assert len(shorter) == 2
    assert shorter.fingerprint != data.fingerprint


def test_wrong_columns_splits_and_names_say_what_there_is(tmp_path: Path):
    file = tmp_path / "q.json"
    file.write_text('{"text": "?"}\n')
    with pytest.raises(DataError, match=r"no column 'question' \(set data\.columns\.question to one of text\)"):
        HuggingFaceDataset(str(file), {"question": "question"})
    with pytest.raises(DataError, match=r"no split 'test' \(set data\.split to one of train\)"):
        HuggingFaceDataset(str(file), {"question": "text"}, split="test")
    with pytest.raises(ConfigError, match="unknown keys prompt"):
        HuggingFaceDataset(str(file), {"question": "text", "prompt": "text"})
    with pytest.raises(ConfigError, match=r"data\.columns\.question is not set"):
        HuggingFaceDataset(str(file), {"image": "text"})
    with pytest.raises(DataError, match=r"ends in none of \.parquet"):
        HuggingFaceDataset(str(Path(__file__)), {"question": "text"})


def test_without_network_one_line_and_no_wait(monkeypatch):
    def unreachable(*args, **kwargs):
        raise ConnectionError("[Errno -2] Name or service not known")

    monkeypatch.setattr("huggingface_hub.constants.is_offline_mode", lambda: False)
    with pytest.raises(DataError, match="not a Hub id"):
        HuggingFaceDataset("a/b/c", {"question": "text"})
    monkeypatch.setattr("huggingface_hub.dataset_info", unreachable)
    with pytest.raises(DataError, match=r"'owner/name': the Hugging Face Hub cannot be reached; set data\.path"):
        HuggingFaceDataset("owner/name", {"question": "text"})


# ---------------------------------------------------------------- configurations
def test_configurations_build_what_they_name(tmp_path: Path, images: Path):
    file = tmp_path / "eval.jsonl"
    file.write_text('{"question_id": 1, "image": "red.png", "text": "Is it red?"}\n')
    shapes = build_dataset(compose("base", ["data.limit=3", "seed=5"]).data)
    assert isinstance(shapes, ShapesDataset)
    assert shapes.fingerprint == ShapesDataset(limit=3, seed=5).fingerprint
    llava = build_dataset(compose("base", ["data=llava_json", f"data.file={file}", f"data.image_folder={images}"]).data)
    assert llava[0].question == "Is it red?"
    overrides = ["data=hf", f"data.path={file}", f"data.image_folder={images}", "data.columns.question=text"]
    hf = build_dataset(compose("base", [*overrides, "data.columns.answer=null"]).data)
    assert hf[0].question == "Is it red?"


@pytest.mark.parametrize(("data", "key"), [("llava_json", "file"), ("hf", "path"), ("exported", "path")])
def test_calibration_data_are_named_by_themselves(data: str, key: str):
    """Not by the data that are asked, which may have no such setting."""
    cfg = compose("evaluate", [f"data@calibration.data={data}", f"calibration.data.{key}=somewhere/else.json"])
    assert OmegaConf.to_container(cfg.calibration.data, resolve=True)["name"] == "else.json"


@settings(derandomize=True, deadline=None)
@given(st.lists(st.sampled_from(["a", "b", "a~2"])))
def test_ids_are_unique_and_the_first_of_each_is_kept(ids: list[str]):
    unique = unique_ids(ids)
    assert len(set(unique)) == len(ids)
    for position, each in enumerate(ids):
        if each not in ids[:position] and "~" not in each:
            assert unique[position] == each


# ---------------------------------------------------------------- images of every kind
def encoded(image: Image.Image, suffix: str = "png", **settings: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, suffix, **settings)
    return buffer.getvalue()


ORIENTATION = 0x0112


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_that_of_datasets_or_of_llava(orientation: int):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 8, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    content = encoded(image, exif=exif)
    upright = datasets.Image().decode_example({"bytes": content, "path": None})
    assert read_image(content, "x", "y").tobytes() == upright.tobytes()
    assert read_image(content, "x", "y", "llava").tobytes() == image.tobytes()


@pytest.mark.parametrize("like", ["datasets", "llava"])
@given(value=st.integers(0, 65535))
@settings(max_examples=30, derandomize=True, deadline=None)
def test_sixteen_bits_are_scaled_and_not_clipped(like: str, value: int):
    content = encoded(Image.fromarray(np.full((3, 4), value, dtype=np.uint16)))
    pixels = np.asarray(read_image(content, "x", "y", like))
    assert pixels.shape == (3, 4, 3)
    assert np.abs(pixels / 255 - value / 65535).max() < 1 / 255


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_without_a_known_white_are_refused(mode: str):
    with pytest.raises(BrokenSample, match="black and white are not known; save it with 8 or 16 bits"):
        read_image(encoded(Image.new(mode, (2, 2), 1), "tiff"), "x", "file line 1")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P"])
def test_transparent_pixels_are_white_or_as_llava_reads_them(mode: str):
    if mode == "P":
        image = Image.new("P", (2, 2), 0)
        image.putpalette([0, 0, 0, 255, 0, 0])
        image.putpixel((0, 0), 1)
        image = Image.open(io.BytesIO(encoded(image, transparency=0)))
        opaque = (255, 0, 0)
    else:
        image = Image.new("RGBA", (2, 2), (0, 0, 0, 0))
        image.putpixel((0, 0), (90, 90, 90, 255))
        image, opaque = image.convert(mode), (90, 90, 90)
    assert to_rgb(image).getpixel((1, 1)) == (255, 255, 255)
    assert to_rgb(image).getpixel((0, 0)) == opaque
    assert to_rgb(image, "llava").tobytes() == image.convert("RGB").tobytes()


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LA", "I;16"])
def test_every_mode_becomes_rgb(mode: str):
    image = Image.new("I;16" if mode == "I;16" else mode, (5, 3))
    assert (to_rgb(image).mode, to_rgb(image).size) == ("RGB", (5, 3))


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.binary(max_size=60), st.integers(0, 200))
def test_damaged_images_are_broken_samples(noise: bytes, at: int):
    content = png()[:at] + noise + png()[at + len(noise) :]
    try:
        image = read_image(content, "x", "file line 1")
    except BrokenSample as error:
        message = str(error)
    else:
        message = f"file line 1: image 'x' is unreadable ({image.size})"
    assert message.startswith("file line 1: image 'x' is unreadable")
    assert "\n" not in message


def test_an_image_too_large_to_unpack_is_a_broken_sample(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(BrokenSample, match=r"image 'x' is unreadable .*decompression bomb"):
        read_image(png(), "x", "file line 1")


# ---------------------------------------------------------------- names of images
@pytest.fixture
def one_image(tmp_path: Path, images: Path):
    """The sample of a record that names an image, through either source."""

    def read(source: str, name: str, **settings: object):
        record = {"question_id": 1, "image": name, "text": "Is it?"}
        file = tmp_path / "one.json"
        file.write_text(json.dumps(record))
        if source == "llava":
            return LlavaJsonDataset(str(file), str(images), **settings)
        columns = {"image": "image", "question": "text"}
        return HuggingFaceDataset(str(file), columns, image_folder=str(images), **settings)

    return read


SOURCES = pytest.mark.parametrize("source", ["llava", "hf"])


@SOURCES
@pytest.mark.parametrize("prefix", ["", "data:image/png;base64,", "data:;base64,"])
def test_base64_and_data_urls_are_images(one_image, source: str, prefix: str):
    big = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)))
    sample = one_image(source, prefix + base64.b64encode(big).decode())[0]
    assert sample.image is not None
    assert sample.image.size == (40, 40)


@SOURCES
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("n" * 300 + ".png", "not found"),
        ("a\0b.png", "not found"),
        ("bild\n.png", "not found"),
        ("https://example.org/" + "x" * 300, "is an address; download it"),
        ("data:image/png;base64,????", "is unreadable"),
        ("../secret.png", "lies outside of"),
        ("sub/../../secret.png", "lies outside of"),
        ("/etc/hostname", "lies outside of"),
        ("", None),
        (" ", "not found"),
    ],
)
def test_odd_names_are_broken_samples(one_image, source: str, name: str, expected: str | None):
    data = one_image(source, name)
    if expected is None:
        assert data[0].image is None
        return
    message = broken(data, 0)
    assert expected in message
    assert len(message) < 400


@SOURCES
def test_images_outside_are_read_when_asked_for(one_image, tmp_path: Path, images: Path, source: str):
    (tmp_path / "secret.png").write_bytes(png())
    for name in ("../secret.png", str(tmp_path / "secret.png")):
        assert one_image(source, name, allow_outside=True)[0].image is not None
    assert one_image(source, str(images / "red.png"))[0].image is not None


# ---------------------------------------------------------------- questions, answers, kinds
@pytest.mark.parametrize("token", PLACEHOLDERS)
def test_placeholders_of_any_model_leave_the_question(token: str):
    assert read_question(f"{token}\nWhat is {token} it?", "x") == "What is  it?"


@pytest.mark.parametrize("text", ["<video>\nwhat?", "<audio> what?"])
def test_questions_about_other_media_are_broken(text: str):
    with pytest.raises(BrokenSample, match="the question is about <"):
        read_question(text, "file line 1")


def test_records_of_other_media_are_broken(tmp_path: Path):
    record = {**conversation("1", "what ?", "x", image=None), "audio": "v.wav"}
    (tmp_path / "a.json").write_text(json.dumps([record]))
    assert "names audio; images and videos are supported" in broken(LlavaJsonDataset(str(tmp_path / "a.json")), 0)


def test_a_lone_surrogate_costs_its_line_only(tmp_path: Path):
    lines = [
        '{"question_id": 1, "text": "what \\ud800 color ?"}',
        '{"question_id": 2, "text": "what ?", "answer": "\\ud83d"}',
        '{"question_id": "\\ud800", "text": "what ?"}',
        '{"question_id": 4, "text": "\\ud83d\\ude00 ?", "answer": "\\ud83d\\ude00"}',
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    data = LlavaJsonDataset(str(tmp_path / "a.jsonl"))
    assert "line 1: the question holds half of a character (lone surrogate U+D800 at 5)" in broken(data, 0)
    assert "line 2: the answer holds half of a character" in broken(data, 1)
    for index in (2, 3):
        sample = data[index]
        json.dumps(sample.id).encode()
        (sample.id + sample.question).encode()
    assert data[3].answer == "\U0001f600"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, []),
        (0, ["0"]),
        (1, ["1"]),
        (3.0, ["3"]),
        (2.5, ["2.5"]),
        (float("nan"), []),
        ("", []),
        ([None, "red", ""], ["red"]),
        ([["red", "dark red"], ["blue"]], ["red", "dark red", "blue"]),
        ({"answer": ["yes", "yes", "no"], "conf": ["a", "b", "c"]}, ["yes", "yes", "no"]),
        ({"text": ["red"], "answer_start": [1]}, ["red"]),
        ([{"answer": "yes", "id": 1}, {"answer": "no", "id": 2}], ["yes", "no"]),
    ],
)
def test_answers_in_every_form(value, expected: list[str]):
    assert read_answers(value, "x") == expected


@pytest.mark.parametrize("value", [{"score": 1}, {}, [{"x": "y"}], b"bytes"])
def test_other_answers_are_broken_and_never_a_python_repr(value):
    with pytest.raises(BrokenSample):
        read_answers(value, "x")


def test_columns_of_every_type(tmp_path: Path):
    """ClassLabel by name, list of one image, number 0 as a kind, dict of lists: through Parquet and `save_to_disk`."""
    rows = {
        "image": [[{"bytes": png((9, 9, 9)), "path": None}], []],
        "question": ["Is it?", "Is it <image> red?"],
        "answer": [1, 0],
        "votes": [{"answer": ["b", "a", "b"]}, {"answer": []}],
        "group": [0, None],
    }
    features = datasets.Features(
        {
            "image": datasets.List(datasets.Image()),
            "question": datasets.Value("string"),
            "answer": datasets.ClassLabel(names=["no", "yes"]),
            "votes": {"answer": datasets.List(datasets.Value("string"))},
            "group": datasets.Value("int64"),
        }
    )
    table = datasets.Dataset.from_dict(rows, features=features)
    table.to_parquet(tmp_path / "x.parquet")
    table.save_to_disk(str(tmp_path / "saved"))
    for path in (tmp_path / "x.parquet", tmp_path / "saved"):
        columns = {"image": "image", "question": "question", "answer": "answer", "kind": "group"}
        one, two = HuggingFaceDataset(str(path), columns)
        assert one.image is not None
        assert one.image.getpixel((0, 0)) == (9, 9, 9)
        assert (one.answer, two.answer, one.kind, two.kind) == ("yes", "no", "0", "all")
        assert (two.image, two.question) == (None, "Is it  red?")
        one, two = HuggingFaceDataset(str(path), {**columns, "answer": "votes", "kind": "answer"})
        assert (one.answer, two.answer, one.kind) == ("b", None, "yes")


def test_one_image_id_for_several_images_shares_no_prefill(tmp_path: Path, images: Path):
    (images / "blue.png").write_bytes(png((0, 0, 255)))
    lines = [{"q": "a?", "i": name, "patient": 7} for name in ("red.png", "blue.png", "red.png")]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    columns = {"image": "i", "question": "q", "image_id": "patient"}
    samples = list(HuggingFaceDataset(str(tmp_path / "a.jsonl"), columns, image_folder=str(images)))
    assert [sample.image_id for sample in samples] == ["7", "7", "7"]
    assert image_numbers(samples) == [0, 1, 0]


# ---------------------------------------------------------------- exact match
@pytest.mark.parametrize("letter", string.ascii_uppercase)
def test_every_option_letter_is_treated_alike(letter: str):
    forms = [letter, letter.lower(), f"{letter}.", f"({letter})", f"{letter})", f" {letter} ", f"{letter}:"]
    assert all(exact_match(one, other) for one in forms for other in forms)
    other = "A" if letter == "Z" else chr(ord(letter) + 1)
    assert not exact_match(other, letter)
    for context in ("vitamin {}", "hepatitis {}", "{}, X9", "{}. Y9"):
        assert not exact_match(context.format(other), context.format(letter))
        assert not exact_match(context.format("").strip(" ,."), context.format(letter))


@settings(max_examples=200, derandomize=True, deadline=None)
@given(st.text(st.characters(categories=["L", "M", "N"]), min_size=1, max_size=8), st.data())
def test_scripts_and_unicode_forms_are_kept_apart(text: str, data):
    for form in ("NFC", "NFD"):
        assert exact_match(unicodedata.normalize(form, text), text)
    cut = data.draw(st.integers(0, len(text) - 1))
    shorter = text[:cut] + text[cut + 1 :]
    same = unicodedata.normalize("NFC", unicodedata.normalize("NFC", shorter).casefold())
    if same.strip() and same != unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold()):
        assert exact_match(shorter, text) is False


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("का", "की", False),
        ("ใหม่", "ใหม้", False),
        ("-5", "5", False),
        ("\u22125", "-5", True),
        ("3.5", "35", False),
        ("3.5.", "3.5", True),
        ("1,000", "1000", True),
        ("$5", "5", True),
        ("The cat!", "cat", True),
        ("on the mat", "on mat", True),
        ("the", "the", True),
        ("...", "...", True),
        ("...", "!", False),
    ],
)
def test_what_counts_as_the_same_answer(answer: str, reference: str, expected: bool):
    assert exact_match(answer, reference) is expected
