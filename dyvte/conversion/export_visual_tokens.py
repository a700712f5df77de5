"""Write down what a fork of LLaVA feeds its language model: token ids, and the visual tokens between them.

This file stands alone. Copy it into the environment of the fork (Python 3.8 or newer, torch, Pillow, the fork itself)
and run it there:

    python export_visual_tokens.py --package llava --model-path CHECKPOINT --conv-mode vicuna_v1 \
        --questions questions.jsonl --image-folder images --output EXPORT

It loads the checkpoint through the fork's own `model.builder.load_pretrained_model`, prepares prompts and images with
its `conversation` and `mm_utils`, calls `prepare_inputs_labels_for_multimodal`, and writes

    EXPORT/export.json                      what was exported, with the fork's prompt format and the names of the shards
    EXPORT/shards/00000-<key>.safetensors   of each sample input_ids (-200 at visual tokens), visual_positions,
                                            visual_embeddings and a thumbnail of the image
    EXPORT/shards/00000-<key>.jsonl         of each sample id, question, answer, ...

Run it again to continue after an interruption. The key says what a shard was made of (weights, settings, questions,
images), so what another checkpoint has left there is never taken. export.json is replaced when all shards are there; an
earlier export stays whole until then. dyvte reads the folder with `model=exported data=exported`.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import inspect
import json
import os
import re
import struct
import sys
import uuid
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple

import torch

IMAGE_SENTINEL = -200
"""Stands for an image among the token ids of the LLaVA code base (IMAGE_TOKEN_INDEX)."""

IGNORE_INDEX = -100
FORMAT = 1
QUESTION = "QUESTION-GOES-HERE"
ANSWER = "ANSWER-GOES-HERE"
IMAGE = "<image>"
THUMBNAIL = 336
SHARD_NAME = re.compile(r"[0-9]{5,}(-[0-9a-f]+)?$")
SUFFIXES = (".jsonl", ".safetensors")
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""What the safetensors format calls types of numbers."""

Record = Dict[str, Any]


def main(argv: Optional[List[str]] = None) -> None:
    """Export as the command line says."""
    options = parse(argv)
    fork = Fork(options)
    questions = list(read_questions(Path(options.questions)))[: options.limit]
    if not questions:
        sys.exit("error: {} holds no question".format(options.questions))
    export(
        fork.model,
        questions,
        fork.prepare,
        Path(options.output),
        describe={
            "package": options.package,
            "model_path": options.model_path,
            "conv_mode": options.conv_mode,
            "prompt": fork.prompt_format(),
        },
        shard_size=options.shard_size,
        image_folder=options.image_folder,
    )


def parse(argv: Optional[List[str]]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--package", default="llava", help="name of the fork's Python package: llava, eagle, ...")
    parser.add_argument("--model-path", required=True, help="checkpoint")
    parser.add_argument("--model-base", default=None, help="language model, for checkpoints of a projector or LoRA")
    parser.add_argument("--model-name", default=None, help="what the fork tells its models by; default: from the path")
    parser.add_argument("--conv-mode", default="vicuna_v1", help="prompt format, a key of the fork's conv_templates")
    parser.add_argument("--questions", required=True, help="LLaVA's JSON with conversations, or JSONL with text")
    parser.add_argument("--image-folder", default="", help="that the image names in the questions are relative to")
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shard-size", type=int, default=64, help="samples a file")
    parser.add_argument("--limit", type=int, default=None, help="the first so many questions")
    return parser.parse_args(argv)


# ---------------------------------------------------------------------------- the fork


class Fork:
    """The fork's package, used the way its own evaluation scripts use it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.conversation = importlib.import_module(options.package + ".conversation")
        self.mm_utils = importlib.import_module(options.package + ".mm_utils")
        builder = importlib.import_module(options.package + ".model.builder")
        name = options.model_name or self.mm_utils.get_model_name_from_path(options.model_path)
        self.tokenizer, self.model, self.image_processor, _ = builder.load_pretrained_model(
            options.model_path, options.model_base, name, device=options.device
        )
        self.model.eval()

    def prompt(self, question: str, with_image: bool, answer: Optional[str] = None) -> str:
        """The prompt of a question, ending where the answer starts, or after the answer."""
        conversation = self.conversation.conv_templates[self.options.conv_mode].copy()
        image = IMAGE
        if getattr(self.model.config, "mm_use_im_start_end", False):
            image = "<im_start>" + IMAGE + "<im_end>"
        conversation.append_message(conversation.roles[0], (image + "\n" if with_image else "") + question)
        conversation.append_message(conversation.roles[1], answer)
        return conversation.get_prompt()

    def prompt_format(self) -> Record:
        """What stands before and after a question, with and without an image, and before and after an answer."""
        whole = self.prompt(QUESTION, False, ANSWER)
        asked = self.prompt(QUESTION, False)
        if not whole.startswith(asked):
            asked = asked.rstrip()
        return {
            "image": self.prompt(QUESTION, True).split(QUESTION),
            "text": self.prompt(QUESTION, False).split(QUESTION),
            "answer": whole[len(asked) :].split(ANSWER),
        }

    def prepare(self, question: Record) -> Record:
        """Prompt, ids and pixels of a question."""
        from PIL import Image

        picture = None
        if question["image"]:
            with Image.open(Path(self.options.image_folder) / question["image"]) as file:
                picture = file.convert("RGB")
        prompt = self.prompt(question["question"], picture is not None)
        ids = self.mm_utils.tokenizer_image_token(prompt, self.tokenizer, IMAGE_SENTINEL, return_tensors="pt")
        images = None
        if picture is not None:
            images = self.mm_utils.process_images([picture], self.image_processor, self.model.config)
        return {"prompt": prompt, "input_ids": ids, "images": images, "picture": picture}


def read_questions(file: Path) -> Iterator[Record]:
    """First questions of LLaVA's training JSON, or the lines of its evaluation JSONL."""
    content = file.read_text(encoding="utf-8-sig")
    if content.lstrip().startswith("["):
        records = json.loads(content)
    else:
        records = [json.loads(line) for line in content.splitlines() if line.strip()]
    for number, record in enumerate(records):
        turns = record.get("conversations")
        question = turns[0]["value"] if turns else record["text"]
        answer = turns[1]["value"] if turns else record.get("answer", record.get("label"))
        name = str(record.get("question_id", record.get("id", number)))
        image = record.get("image")
        yield {
            "id": name,
            "question": question.replace(IMAGE, "").strip(),
            "answer": None if answer is None else str(answer),
            "kind": str(record.get("kind", record.get("category", "all"))),
            "image": image,
            "image_id": image or name,
        }


# -------------------------------------------------------------------------- exporting


def export(
    model: Any,
    questions: List[Record],
    prepare: Callable[[Record], Record],
    output: Path,
    describe: Record,
    shard_size: int = 64,
    image_folder: str = "",
) -> None:
    """Write the samples in shards; shards that are there already are kept if they were made of the same.

    Args:
        model: the fork's model, with `prepare_inputs_labels_for_multimodal`.
        questions: `id`, `question`, `answer`, `kind`, `image` (in the image folder), `image_id` of each sample.
        prepare: gives `prompt`, `input_ids` (1-D, -200 for an image), `images` (pixels as the model takes them, or
            None) and `picture` (PIL image, or None) of a question.
        describe: goes into `export.json`.
    """
    if not hasattr(model, "prepare_inputs_labels_for_multimodal"):
        wrong = "has no prepare_inputs_labels_for_multimodal, so it is not of the LLaVA code base"
        sys.exit("error: {} {}".format(type(model).__name__, wrong))
    shards = output / "shards"
    shards.mkdir(parents=True, exist_ok=True)
    embedding = model.get_input_embeddings().weight
    config = getattr(model, "config", None)
    about = {
        "format": FORMAT,
        "hidden_size": embedding.shape[1],
        "shard_size": shard_size,
        "num_samples": len(questions),
        "visual_tokens_by_column": "downsample" in str(getattr(config, "mm_projector_type", "")),
        "torch": torch.__version__,
        "text_embeddings": some_rows(embedding),
        **describe,
    }
    made_of = [digest_of_weights(model), str(about["torch"]), json.dumps(describe, sort_keys=True)]
    parts = [questions[first : first + shard_size] for first in range(0, len(questions), shard_size)]
    names = [
        "{:05d}-{}".format(number, digest_of_questions(part, Path(image_folder), made_of))
        for number, part in enumerate(parts)
    ]
    while missing := [number for number, name in enumerate(names) if not is_there(shards, name)]:
        for number in missing:
            write_shard(model, parts[number], prepare, shards, names[number])
            done = min((number + 1) * shard_size, len(questions))
            print("{} of {} samples".format(done, len(questions)), flush=True)
    replaced = shards_of(output)
    text = json.dumps({**about, "shards": names}, indent=1, ensure_ascii=False)
    write(output / "export.json", [text.encode(), b"\n"])
    for name in replaced:
        if name not in names:
            for suffix in SUFFIXES:
                file = shards / (name + suffix)
                if file.exists():
                    file.unlink()


def write_shard(
    model: Any, questions: List[Record], prepare: Callable[[Record], Record], shards: Path, name: str
) -> None:
    """Write the two files of a shard, the tensors last."""
    tensors: Record = {}
    lines: List[str] = []
    for number, question in enumerate(questions):
        sample, line = export_sample(model, question, prepare(question))
        line["embeddings"] = share(tensors, sample.pop("visual_embeddings"), number)
        tensors.update({"{}.{}".format(number, key): value for key, value in sample.items()})
        lines.append(json.dumps(line, ensure_ascii=False))
    write(shards / (name + ".jsonl"), ["\n".join(lines).encode(), b"\n"])
    write(shards / (name + ".safetensors"), safetensors_file(tensors))


def is_there(shards: Path, name: str) -> bool:
    """Whether a shard is finished."""
    return all((shards / (name + suffix)).is_file() for suffix in SUFFIXES)


def shards_of(output: Path) -> List[str]:
    """Names of the shards that belong to the export in a folder; those of others, perhaps being written, do not."""
    try:
        listed = json.loads((output / "export.json").read_text()).get("shards")
    except (OSError, ValueError, AttributeError):
        return []
    if isinstance(listed, list):
        return [name for name in listed if isinstance(name, str) and SHARD_NAME.match(name)]
    numbered = (file.stem for file in (output / "shards").glob("*.safetensors"))  # what older versions wrote
    return sorted(name for name in numbered if SHARD_NAME.match(name))


def digest_of_weights(model: Any) -> str:
    """SHA-256 of every weight and buffer."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update("{} {} {}\n".format(name, getattr(tensor, "dtype", ""), getattr(tensor, "shape", "")).encode())
        if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
            digest.update(bytes_of(tensor.detach()))
    return digest.hexdigest()


def digest_of_questions(questions: List[Record], image_folder: Path, made_of: List[str]) -> str:
    """What a shard is made of, in 16 hexadecimal digits: the given texts, the questions and their image files."""
    digest = hashlib.sha256("\n".join(made_of).encode())
    for question in questions:
        digest.update(json.dumps(question, sort_keys=True).encode())
        file = image_folder / str(question["image"])
        if question["image"] and file.is_file():
            digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:16]


def some_rows(embedding: torch.Tensor) -> Record:
    """The first numbers of a few rows of the text embeddings, by which dyvte knows the language model again."""
    rows = range(0, len(embedding), max(len(embedding) // 8, 1))
    return {str(row): embedding[row, :4].detach().float().cpu().tolist() for row in rows}


def share(tensors: Record, embeddings: torch.Tensor, number: int) -> str:
    """Store the embeddings of sample `number`, or find them among those of an earlier question on the same image."""
    for key, stored in tensors.items():
        if key.endswith(".visual_embeddings") and stored.shape == embeddings.shape and torch.equal(stored, embeddings):
            return key
    key = "{}.visual_embeddings".format(number)
    tensors[key] = embeddings
    return key


@torch.no_grad()
def export_sample(model: Any, question: Record, prepared: Record) -> Tuple[Record, Record]:
    """Tensors and description of one sample."""
    ids = prepared["input_ids"].reshape(-1).cpu()
    embeddings, labels = expand(model, ids, prepared["images"], prepared.get("picture"))
    visual = labels == IGNORE_INDEX
    where = "question {!r}: ".format(question["id"])
    if not torch.equal(labels[~visual], ids[ids != IMAGE_SENTINEL]):
        raise ValueError(where + "the fork cut the prompt short (tokenizer_model_max_length), or changed its text")
    if embeddings is not None:
        table = model.get_input_embeddings()
        own = table(labels[~visual].to(table.weight.device)).to(embeddings.device, embeddings.dtype)
        if not torch.equal(own, embeddings[~visual.to(embeddings.device)]):
            raise ValueError(where + "the fork changes the embeddings of text tokens, which dyvte cannot reproduce")
        embeddings = embeddings[visual.to(embeddings.device)].cpu()
    else:
        weight = model.get_input_embeddings().weight
        embeddings = torch.zeros(0, weight.shape[1], dtype=weight.dtype)
    sample = {
        "input_ids": labels.masked_fill(visual, IMAGE_SENTINEL),
        "visual_positions": visual.nonzero().flatten(),
        "visual_embeddings": embeddings.contiguous(),
    }
    picture = prepared.get("picture")
    if picture is not None:
        small = picture.copy()
        small.thumbnail((THUMBNAIL, THUMBNAIL))
        pixels = torch.tensor(list(small.convert("RGB").tobytes()), dtype=torch.uint8)
        sample["thumbnail"] = pixels.reshape(small.height, small.width, 3)
    line = {key: question[key] for key in ("id", "question", "answer", "kind", "image_id")}
    return sample, {**line, "prompt": prepared["prompt"]}


def expand(model: Any, ids: torch.Tensor, images: Any, picture: Any) -> Tuple[Optional[torch.Tensor], torch.Tensor]:
    """Input embeddings [N, d] of a prompt with its images, and its ids [N] with -100 at visual positions.

    The function of the fork takes labels along: given the ids themselves, it marks what it inserts. Forks differ in
    the arguments (older ones have no position_ids, newer ones image_sizes); all return embeddings and labels last.
    """
    weight = model.get_input_embeddings().weight
    ids = ids[None].to(weight.device)
    if isinstance(images, (list, tuple)):
        images = [image.to(weight.device, weight.dtype) for image in images]
    elif images is not None:
        images = images.to(weight.device, weight.dtype)
    arguments = {
        "input_ids": ids,
        "position_ids": None,
        "attention_mask": None,
        "past_key_values": None,
        "labels": ids.clone(),
        "images": images,
        "image_sizes": None if picture is None else [picture.size],
    }
    function = model.prepare_inputs_labels_for_multimodal
    accepted = inspect.signature(function).parameters
    result = function(**{name: value for name, value in arguments.items() if name in accepted})
    embeddings, labels = result[-2], result[-1]
    return (None if embeddings is None else embeddings[0]), labels[0].cpu()


# ---------------------------------------------------------------------------- writing


def write(path: Path, parts: Iterable[Any]) -> None:
    """Write a file, complete or not at all: under a temporary name, then rename it."""
    temporary = path.with_name(".tmp-" + uuid.uuid4().hex)
    try:
        with temporary.open("wb") as out:
            out.writelines(parts)
        os.replace(str(temporary), str(path))
    finally:
        if temporary.exists():
            temporary.unlink()


def safetensors_file(tensors: Record) -> Iterator[Any]:
    """The bytes of a safetensors file. Needs no package that a fork may not have."""
    described = ((name, each.dtype, each.shape, each.numel() * each.element_size()) for name, each in tensors.items())
    yield safetensors_header(described)
    yield from map(bytes_of, tensors.values())


def safetensors_header(tensors: Iterable[Tuple[str, torch.dtype, Sequence[int], int]]) -> bytes:
    """What stands before the data: name, type, shape and bytes of every tensor, after the length of all that."""
    header: Record = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dtype, shape, size in tensors:
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def bytes_of(tensor: torch.Tensor) -> Any:
    """The content of a tensor."""
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


if __name__ == "__main__":
    main()
