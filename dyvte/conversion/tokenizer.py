"""Tokenizers of the LLaVA code base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AddedToken, LlamaTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import import_protobuf
from transformers.tokenization_utils_base import generate_merges

from dyvte.conversion.source import Source
from dyvte.errors import ModelError

IMAGE_TOKEN = "<image>"


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer of a checkpoint, able to pad: `tokenizer.json`, else the SentencePiece model of Llama."""
    if (folder / "tokenizer.json").is_file():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    elif (folder / "tokenizer.model").is_file():
        tokenizer = _llama_tokenizer(folder)
    else:
        raise ModelError(f"{folder}: no tokenizer (tokenizer.json or tokenizer.model)")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def _llama_tokenizer(folder: Path) -> Any:
    """Llama's tokenizer from its SentencePiece model, which is a list of pieces with scores."""
    proto = import_protobuf().ModelProto()
    proto.ParseFromString((folder / "tokenizer.model").read_bytes())
    vocabulary = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    control = [piece.piece for piece in proto.pieces if piece.type in (2, 3)]  # unknown, control
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == 1}
    # The code base tokenizes the text before and after an image apart, each with SentencePiece's leading space: legacy.
    tokenizer = LlamaTokenizer(
        vocab=vocabulary,
        merges=generate_merges(vocabulary, scores, skip_tokens=control),
        legacy=True,
        add_bos_token=True,
    )
    added = folder / "added_tokens.json"
    if added.is_file():
        extra = json.loads(added.read_text())
        tokenizer.add_tokens(
            [AddedToken(token, special=True, normalized=False) for token in sorted(extra, key=extra.__getitem__)]
        )
    return tokenizer


def add_image_token(tokenizer: Any, source: Source) -> tuple[int, int]:
    """Id of the image placeholder, and how many rows the embedding needs."""
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    tokenizer.image_token = IMAGE_TOKEN
    tokenizer.padding_side = "left"
    image_token_id = int(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
    return image_token_id, max(source.text["model.embed_tokens.weight"].shape[0], image_token_id + 1)
