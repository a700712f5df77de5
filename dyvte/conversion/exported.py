"""Models that run in another environment: their language model here, their visual tokens from an export.

`dyvte/conversion/export_visual_tokens.py` writes, in the environment of a fork of LLaVA, what its vision side makes
of each image. Here the language model of the same checkpoint gets those tokens (`model=exported data=exported`): its
vision tower and projector are not needed, so any of them will do. What the vision side costs is not counted.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import logging

from dyvte.conversion.export_visual_tokens import FORMAT, IMAGE, IMAGE_SENTINEL, SHARD_NAME, is_there, shards_of
from dyvte.conversion.source import checkpoint_folder, read_language_model
from dyvte.conversion.tokenizer import read_tokenizer
from dyvte.data.base import Dataset, Sample, check_limit, text_fingerprint, unique_ids
from dyvte.errors import BrokenSample, DataError, ModelError
from dyvte.stored_files import check_safetensors, read_json, reason_of

PROMPT_KINDS = ("image", "text", "answer")
_LINE_KEYS = ("id", "question", "answer", "kind", "image_id", "prompt", "embeddings")
INFO_KEY = "dyvte_visual_tokens"
"""Where the images of `ExportedDataset` carry their visual tokens (in `PIL.Image.Image.info`, which copies keep)."""


@dataclass(frozen=True)
class VisualTokens:
    """What an export holds of one sample.

    Attributes:
        prompt: text of the prompt, `<image>` where the image goes.
        input_ids: [N] ids of the prompt, -200 at visual positions.
        embeddings: [V, d] input embeddings of the visual positions.
    """

    prompt: str
    input_ids: Tensor
    embeddings: Tensor


class Export:
    """A folder that `dyvte/conversion/export_visual_tokens.py` wrote: finished, and its files undamaged."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        self.about = _read_about(self.folder)
        self.lines: list[dict[str, Any]] = []
        for name in shards_of(self.folder):
            if is_there(self.folder / "shards", name):
                self.lines += _read_shard(self.folder / "shards" / f"{name}.safetensors", self.about["hidden_size"])
        if len(self.lines) != self.about["num_samples"]:
            raise DataError(
                f"{self.folder} holds {len(self.lines)} of {self.about['num_samples']} samples: the export was "
                "interrupted; run it again to continue"
            )

    def tokens(self, index: int) -> tuple[VisualTokens, Image.Image | None]:
        """Visual tokens and thumbnail of sample `index`."""
        line = self.lines[index]
        number = line["number"]
        with safe_open(line["file"], framework="pt") as file:
            tokens = VisualTokens(
                line["prompt"], file.get_tensor(f"{number}.input_ids"), file.get_tensor(line["embeddings"])
            )
            has_image = f"{number}.thumbnail" in file.keys()  # noqa: SIM118
            picture = Image.fromarray(file.get_tensor(f"{number}.thumbnail").numpy()) if has_image else None
        return tokens, picture

    @cached_property
    def used_ids(self) -> set[int]:
        """Token ids that occur in a prompt."""
        found: set[int] = set()
        for line in self.lines:
            with safe_open(line["file"], framework="pt") as file:
                found |= set(file.get_tensor(f"{line['number']}.input_ids").tolist())
        return found


def _read_about(folder: Path) -> dict[str, Any]:
    file = folder / "export.json"
    if not file.is_file():
        hint = "give the folder that dyvte/conversion/export_visual_tokens.py wrote"
        if any((folder / "shards").glob("*")):
            hint = "the export was interrupted; run it again to continue"
        raise DataError(f"{folder} holds no export.json: {hint}")
    about = read_json(file, DataError, "run the export again")
    if about.get("format") != FORMAT:
        raise DataError(f"{folder}: export format {about.get('format')!r}, this dyvte reads {FORMAT}")
    prompt = about.get("prompt")
    right = {
        "hidden_size": isinstance(about.get("hidden_size"), int),
        "num_samples": isinstance(about.get("num_samples"), int),
        "prompt": isinstance(prompt, Mapping) and all(_is_pair(prompt.get(kind)) for kind in PROMPT_KINDS),
        "text_embeddings": isinstance(about.get("text_embeddings", {}), Mapping),
    }
    if wrong := [key for key, fits in right.items() if not fits]:
        raise DataError(f"{file}: {wrong[0]!r} is missing or wrong; run the export again")
    for name in about.get("shards") or ():
        if not isinstance(name, str) or not SHARD_NAME.match(name):
            raise DataError(f"{file}: names a shard {name!r} that is no file of {folder / 'shards'}; it is not read")
    return about


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(each, str) for each in value)


def _read_shard(file: Path, width: int) -> list[dict[str, Any]]:
    """The lines of a shard, its tensors checked by name, type and shape; what is in them is not read."""
    lines, text = [], file.with_suffix(".jsonl")
    try:
        for number, row in enumerate(text.read_text(encoding="utf-8").split("\n")[:-1]):
            lines.append({**json.loads(row), "file": file, "number": number})
            wrong = [key for key in _LINE_KEYS if not isinstance(lines[-1].get(key, 0), (str, NoneType))]
            if wrong or not all(lines[-1][key] for key in ("prompt", "embeddings")):
                raise ValueError(f"line {number + 1} has no text as {(wrong or ['prompt'])[0]!r}")
    except (ValueError, TypeError, RecursionError) as error:
        raise DataError(f"{text}: damaged ({reason_of(error)}); delete it and export again") from error
    shapes = check_safetensors(file, DataError, "delete it and export again")
    for line in lines:
        number, embeddings = line["number"], shapes.get(str(line["embeddings"]), ("missing", []))
        positions = shapes.get(f"{number}.visual_positions", ("missing", []))
        ids = shapes.get(f"{number}.input_ids", ("missing", []))
        picture = shapes.get(f"{number}.thumbnail", ("U8", [1, 1, 3]))
        fits = ids[0] == positions[0] == "I64" and embeddings[0] in ("F16", "BF16", "F32")
        fits = fits and len(ids[1]) == len(positions[1]) == 1 and embeddings[1] == [positions[1][0], width]
        if not fits or picture[0] != "U8" or len(picture[1]) != 3 or picture[1][2] != 3:
            raise DataError(
                f"{file}: sample {number} holds embeddings {embeddings}, ids {ids}; expected numbers of width {width} "
                "as export.json says; delete it and export again"
            )
    return lines


class ExportedDataset(Dataset):
    """The samples of an export, or the first so many; their images are thumbnails that carry the visual tokens."""

    def __init__(self, path: str, limit: int | None = None) -> None:
        check_limit(limit)
        self.export = Export(path)
        self.lines = self.export.lines[:limit]
        self.ids = unique_ids(str(line["id"]) for line in self.lines)

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> Sample:
        line = self.lines[index]
        tokens, picture = self.export.tokens(index)
        if not torch.isfinite(tokens.embeddings).all():
            raise BrokenSample(f"{line['file']} sample {line['number']}", "visual tokens that are not finite numbers")
        if int((tokens.input_ids == IMAGE_SENTINEL).sum()) != len(tokens.embeddings):
            raise BrokenSample(
                f"{line['file']} sample {line['number']}", "another number of visual tokens than its ids"
            )
        if picture is not None:
            picture.info[INFO_KEY] = tokens
        return Sample(
            id=self.ids[index],
            image=picture,
            question=line["question"],
            answer=line["answer"],
            kind=line["kind"],
            image_id=line["image_id"],
        )

    @property
    def fingerprint(self) -> str:
        """Of the export's description and its samples' ids, prompts and answers."""
        described = [json.dumps({**line, "file": line["file"].name}, sort_keys=True) for line in self.lines]
        return text_fingerprint([json.dumps(self.export.about, sort_keys=True), *described])


class ExportedProcessor:
    """Makes model inputs of prompts and of images that carry their visual tokens, as a processor does of pixels.

    Attributes:
        tokenizer: of the checkpoint.
        image_token_id: stands at the visual positions. No row is added to the vocabulary: it is an id that no prompt
            of the export uses.
    """

    chat_template = "export"  # `apply_chat_template` follows the fork's prompt format
    image_token = IMAGE

    def __init__(self, export: Export, tokenizer: Any, image_token_id: int) -> None:
        self.format: dict[str, list[str]] = export.about["prompt"]
        self.tokenizer, self.image_token_id = tokenizer, image_token_id

    def apply_chat_template(
        self, messages: Sequence[dict[str, Any]], add_generation_prompt: bool = True, **_: Any
    ) -> str:
        """The prompt as the fork writes it, with the answer behind it where the messages hold one."""
        content = messages[0]["content"]
        question = "".join(part["text"] for part in content if part["type"] == "text")
        kind = "image" if any(part["type"] == "image" for part in content) else "text"
        before, after = self.format[kind]
        prompt = before + question + after
        if len(messages) == 1:
            return prompt
        separator, end = self.format["answer"]
        return prompt.rstrip() + separator + str(messages[1]["content"][0]["text"]) + end

    def __call__(
        self,
        text: Sequence[str],
        images: Sequence[Sequence[Image.Image]] | None = None,
        padding_side: str = "left",
        **_: Any,
    ) -> dict[str, Any]:
        """Ids [B, N], attention mask, and the visual tokens as `mm_encoder_outputs`."""
        rows, visual = [], []
        for prompt, of_row in zip(text, images or [[]] * len(text), strict=True):
            if len(of_row) > 1:
                raise ModelError("model=exported takes one image a question: the one that was exported with it")
            tokens = of_row[0].info.get(INFO_KEY) if of_row else None
            if of_row and tokens is None:
                raise ModelError(
                    "model=exported sees exported images only (data=exported): its vision tower runs in another "
                    "environment"
                )
            rows.append(self._ids(prompt, tokens))
            if tokens is not None:
                visual.append(tokens.embeddings)
        pad = partial(pad_sequence, batch_first=True, padding_side=padding_side)
        inputs: dict[str, Any] = {
            "input_ids": pad(rows, padding_value=self.tokenizer.pad_token_id or 0),
            "attention_mask": pad([torch.ones_like(ids) for ids in rows]),
        }
        if visual:
            inputs["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=visual)}
        return inputs

    def _ids(self, prompt: str, tokens: VisualTokens | None) -> Tensor:
        if tokens is None:
            bos = self.tokenizer.bos_token
            alone = self.tokenizer(prompt, add_special_tokens=not (bos and prompt.startswith(bos)))
            return torch.tensor(alone["input_ids"])
        ids = tokens.input_ids
        if prompt != tokens.prompt:  # another question about the image
            last = int((ids == IMAGE_SENTINEL).nonzero().max())
            tail = self.tokenizer(prompt.rpartition(IMAGE)[2], add_special_tokens=False)["input_ids"]
            ids = torch.cat([ids[: last + 1], torch.tensor(tail)])
        return ids.masked_fill(ids == IMAGE_SENTINEL, self.image_token_id)


_LANGUAGE_MODEL = {r"^model\.(embed_tokens|layers|norm)\.": r"model.language_model.\1."}
_STAND_INS = ("model.vision_tower.", "model.multi_modal_projector.")


def load_language_model(
    path: str, exported: str | Path, *, revision: str | None = None, token: str | bool | None = None, **settings: Any
) -> tuple[Any, ExportedProcessor]:
    """The language model of a checkpoint (folder or Hub id) as one that takes the visual tokens exported from it.

    `settings` go to `from_pretrained`.
    """
    export = Export(exported)
    folder = checkpoint_folder(path, revision, token)
    source = read_language_model(folder)
    text_config = source.text_config
    if text_config.hidden_size != (width := export.about["hidden_size"]):
        raise ModelError(
            f"{path} has hidden size {text_config.hidden_size}, the visual tokens in {exported} have {width}: they are "
            f"of another model ({export.about.get('model_path')})"
        )
    tokenizer = read_tokenizer(source.tokenizer_folder)
    rows = source.text["model.embed_tokens.weight"].shape[0]
    text_config.vocab_size = rows
    config = LlavaConfig(
        text_config=text_config,
        # Stands in for the vision side, which is not here; the smallest that can be built.
        vision_config=CLIPVisionConfig(
            hidden_size=1, intermediate_size=1, num_hidden_layers=1, num_attention_heads=1, image_size=1, patch_size=1
        ),
        image_token_index=_placeholder(tokenizer, rows, export),
        tie_word_embeddings=bool(text_config.tie_word_embeddings),
    )
    config.visual_tokens_by_column = bool(export.about.get("visual_tokens_by_column"))
    with _quiet():
        model, report = LlavaForConditionalGeneration.from_pretrained(
            source.tokenizer_folder,
            config=config,
            key_mapping=_LANGUAGE_MODEL,
            output_loading_info=True,
            local_files_only=True,
            **settings,
        )
    missing = [name for name in report["missing_keys"] if not name.startswith(_STAND_INS)]
    if missing:
        raise ModelError(f"{path}: {len(missing)} tensors of the language model are missing, the first: {missing[0]}")
    _check_embeddings(model.get_input_embeddings().weight, export, path)
    for name, parameter in model.named_parameters():
        if name.startswith(_STAND_INS) and not parameter.is_meta:
            torch.nn.init.zeros_(parameter)  # the same at every start, so that runs can be continued
    return model, ExportedProcessor(export, tokenizer, config.image_token_id)


def _check_embeddings(weight: Tensor, export: Export, path: str) -> None:
    """Refuse a language model of the right width whose text embeddings are not those of the exported model."""
    for row, numbers in export.about.get("text_embeddings", {}).items():
        if weight.is_meta:
            return
        expected = torch.tensor(numbers, dtype=torch.float64)
        own = weight[int(row), : len(numbers)].cpu().double() if int(row) < len(weight) else torch.tensor(torch.inf)
        if not torch.allclose(own, expected, rtol=0.01, atol=1e-6):  # either may be rounded to half precision
            raise ModelError(
                f"{path} is not the model whose visual tokens are in {export.folder} (exported from "
                f"{export.about.get('model_path')}): the embeddings of token {row} differ; give that checkpoint"
            )


def _placeholder(tokenizer: Any, rows: int, export: Export) -> int:
    """An id for the visual positions that occurs in no prompt: the unknown token's, else the highest unused one."""
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    for each in (tokenizer.unk_token_id, *range(rows - 1, -1, -1)):
        if each is not None and each not in export.used_ids and each not in special:
            return int(each)
    raise ModelError(f"{export.folder}: every id of the vocabulary occurs in a prompt, none is left for visual tokens")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from reporting that the vision side is missing: it is meant to be."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
