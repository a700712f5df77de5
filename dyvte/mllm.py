"""Loading multimodal LLMs and finding their parts.

Everything that the toolkit needs to know about a model family (decoder layers, self-attention modules, image token
id, head layout, prompt format) is read from the model, its config and its processor. A family that follows the
image-text-to-text protocol of transformers needs no code here.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from dyvte.batch import IGNORE_INDEX, Batch, Image
from dyvte.errors import ModelError, UnsupportedError
from dyvte.layout import TokenLayout


class MLLM:
    """A multimodal LLM with its parts found: use `load` or `wrap` to make one.

    Attributes:
        model: the `...ForConditionalGeneration` model, in eval mode.
        processor: its processor, or None (then only `batch` works, not `encode`).
        decoder: the text decoder stack, owner of `layers`, the final norm and the rotary embedding.
        layers: the L decoder layers.
        lm_head: the output embedding module.
        text_config: config of the decoder.
        image_token_id: id of the placeholder that stands for one visual token.
        visual_token_ids: all placeholder ids that count as visual (image and, where there is one, video).
        commit: of the Hub repository that `load` read; None where the model did not come from the Hub.
    """

    commit: str | None = None

    def __init__(self, model: Any, processor: Any = None) -> None:
        self.model: Any = model.eval()
        self.processor = processor
        self.text_config = _text_config(model)
        self.visual_token_ids = _visual_token_ids(model, processor)
        self.image_token_id = self.visual_token_ids[0]
        self.decoder, self.layers = _find_decoder(model, self.text_config)
        self.lm_head = model.get_output_embeddings()
        if self.lm_head is None:
            raise ModelError(
                f"{type(model).__name__} has no output embeddings: load the ...ForConditionalGeneration class"
            )

    def __repr__(self) -> str:
        name = type(self.model).__name__
        return f"MLLM({name}, {self.num_layers} layers, {self.num_heads} heads, hidden size {self.hidden_size})"

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer, or None."""
        return getattr(self.processor, "tokenizer", None)

    @property
    def num_layers(self) -> int:
        """L, the number of decoder layers."""
        return len(self.layers)

    @property
    def hidden_size(self) -> int:
        """d, the width of a hidden state."""
        return self.text_config.hidden_size

    @property
    def num_heads(self) -> int:
        """H, the number of query heads."""
        return self.text_config.num_attention_heads

    @property
    def device(self) -> torch.device:
        """Where inputs go: the device of the input embeddings."""
        return self.model.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the model."""
        return self.model.dtype

    @cached_property
    def attentions(self) -> list[nn.Module]:
        """The self-attention module of every decoder layer, in layer order.

        Raises:
            UnsupportedError: a layer has none (a recurrent or linear-attention layer of a hybrid model).
        """
        found = []
        for index, layer in enumerate(self.layers):
            module = _self_attention(layer)
            if module is None:
                raise UnsupportedError(
                    f"{type(self.model).__name__}: decoder layer {index} ({type(layer).__name__}) has no "
                    "self-attention module; dyvte needs attention in every layer"
                )
            found.append(module)
        return found

    # ------------------------------------------------------------------ inputs

    def layout(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> TokenLayout:
        """Roles of the positions of a prompt, from its ids [B, N] (all text after the image is `instruction`)."""
        return TokenLayout.from_input_ids(input_ids, attention_mask, self.visual_token_ids)

    def batch(self, **model_inputs: Any) -> Batch:
        """Model inputs prepared elsewhere, moved to the model's device and floating-point type.

        Raises:
            ValueError: there are no `input_ids` (roles cannot be told from embeddings).
        """
        if model_inputs.get("input_ids") is None:
            raise ValueError("batch() needs input_ids: the roles of the tokens are found from them")
        inputs = {name: self._place(value) for name, value in model_inputs.items()}
        return Batch(inputs, self.layout(inputs["input_ids"], inputs.get("attention_mask")))

    def encode(
        self,
        images: Sequence[Image | Sequence[Image] | None] | None,
        questions: Sequence[str],
        answers: Sequence[str | None] | None = None,
        padding_side: str = "left",
    ) -> Batch:
        """Turn images and questions into a batch, through the processor's chat template.

        Args:
            images: one entry a question: an image, a list of images, or None for a text-only prompt. None for all.
            questions: one a sample. The images come before the text of the question.
            answers: teacher-forced after the prompt, each followed by the end token; their positions are `answer`.
                None for samples without one.
            padding_side: "left" (what generation needs) or "right".
        """
        processor = self._require_processor()
        rows = _image_rows(images, questions)
        prompts = [self._prompt(question, len(row)) for question, row in zip(questions, rows, strict=True)]
        bos = self.tokenizer.bos_token
        inputs = processor(
            text=prompts,
            images=rows if any(rows) else None,
            padding=True,
            padding_side=padding_side,
            add_special_tokens=not (bos and prompts[0].startswith(bos)),
            return_tensors="pt",
        )
        batch = self.batch(**inputs)
        expected = torch.tensor([bool(row) for row in rows], device=batch.layout.roles.device)
        if not torch.equal(batch.layout.has_image, expected):
            raise ModelError(
                f"{type(processor).__name__} put no image token (id {self.image_token_id}) where an image was given: "
                "its chat template or its image token does not fit the model"
            )
        self._warn_if_question_precedes_image(prompts, questions, rows)
        return batch if answers is None else self.append_answers(batch, self.answer_ids(questions, answers))

    def answer_ids(self, questions: Sequence[str], answers: Sequence[str | None]) -> Tensor:
        """Ids [B, A] of the answers as they follow the prompts, end token included, -100 at padding and for None."""
        self._require_processor()
        rows: list[list[int]] = []
        for question, answer in zip(questions, answers, strict=True):
            if answer is None:
                rows.append([])
                continue
            prompt = self._prompt(question, 0)
            before = self._tokenize(prompt)
            joint = self._tokenize(prompt + self._answer_separator(question, prompt) + answer)
            # A tokenizer may merge the end of the prompt with the answer; then the answer is tokenized on its own.
            ids = joint[len(before) :] if joint[: len(before)] == before else self._tokenize(answer)
            rows.append([*ids, self.tokenizer.eos_token_id])
        padded = torch.full((len(rows), max(map(len, rows))), IGNORE_INDEX, dtype=torch.long)
        for index, ids in enumerate(rows):
            padded[index, : len(ids)] = torch.tensor(ids)
        return padded.to(self.device)

    # -------------------------------------------------------------- generation

    def generate(self, batch: Batch, **kwargs: Any) -> list[str] | list[list[int]]:
        """Answer the prompts of a batch; greedy and at most 64 new tokens unless `kwargs` say otherwise.

        Args:
            batch: from `encode` or `batch`, without answers, padded on either side.
            **kwargs: passed to `model.generate`.

        Returns:
            Answers as text; without a processor the generated ids, end token included where one was generated.
        """
        ids = self.generate_ids(batch, **kwargs)
        return ids if self.tokenizer is None else self.decode(ids)

    @torch.no_grad()
    def generate_ids(self, batch: Batch, **kwargs: Any) -> list[list[int]]:
        """Like `generate`, but always the generated ids, end token included where one was generated.

        A generated image token (random weights do that) ends an answer as the end token does: no image belongs to it,
        so nothing that follows it could be teacher-forced.
        """
        if batch.layout.answer.any():
            raise ValueError("generate() needs a batch encoded without answers")
        settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": 64}
        end_ids = _end_token_ids(self.model)
        if self.model.generation_config.pad_token_id is None:  # else transformers chooses one, warning at every call
            pad_id = getattr(self.tokenizer, "pad_token_id", None)
            settings["pad_token_id"] = pad_id if pad_id is not None else end_ids[0] if end_ids else 0
        settings.update(kwargs)
        inputs = dict(batch.left_padded())
        if "mm_encoder_outputs" in inputs:  # beam search repeats in place what these hold
            inputs["mm_encoder_outputs"] = {
                kind: copy.copy(output) for kind, output in inputs["mm_encoder_outputs"].items()
            }
        generated = self.model.generate(**inputs, **settings)
        sequences = getattr(generated, "sequences", generated)[:, inputs["input_ids"].shape[1] :]
        return [_cut_after_end(row.tolist(), [*end_ids, *self.visual_token_ids]) for row in sequences]

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """Generated ids as text, without special tokens."""
        self._require_processor()
        return [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    # ----------------------------------------------------------------- private

    def _place(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(self.device, self.dtype if value.is_floating_point() else None)

    def _require_processor(self) -> Any:
        if self.processor is None:
            raise ModelError("this MLLM has no processor: use dyvte.wrap(model, processor), or batch() with token ids")
        return self.processor

    def _prompt(self, question: str, num_images: int, answer: str | None = None) -> str:
        if getattr(self.processor, "chat_template", None):
            content = [{"type": "image"}] * num_images + [{"type": "text", "text": question}]
            messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
            if answer is not None:
                messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
            return self.processor.apply_chat_template(messages, add_generation_prompt=answer is None)
        # The prompt format of LLaVA-1.5, for processors without a template.
        images = f"{self.processor.image_token}\n" * num_images
        return f"USER: {images}{question} ASSISTANT:" + ("" if answer is None else f" {answer}")

    def _answer_separator(self, question: str, prompt: str) -> str:
        """What the prompt format puts between a prompt and its answer (a space in LLaVA-1.5's)."""
        marker = "\N{BULLET}answer\N{BULLET}"
        rendered = self._prompt(question, 0, answer=marker)
        if not rendered.startswith(prompt) or marker not in rendered:
            return ""
        return rendered[len(prompt) :].partition(marker)[0]

    def _tokenize(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def append_answers(self, batch: Batch, answer_ids: Tensor) -> Batch:
        """Teacher-force answers [B, A], -100 at padding, behind the prompts of a batch."""
        real = answer_ids != IGNORE_INDEX
        prompt_length = batch["input_ids"].shape[1]
        if batch.layout.padding[:, -1].any():
            batch = batch.left_padded()
        extension = {"input_ids": answer_ids.masked_fill(~real, 0), "attention_mask": real.long()}
        types = batch.get("token_type_ids")
        visual = batch.layout.visual
        if types is not None and visual.any() and not types[visual].any():
            # Types that do not mark the image mark the prefix (PaliGemma), which answers are not part of.
            extension["token_type_ids"] = torch.ones_like(answer_ids)
        inputs = dict(batch)
        inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
        for name, value in inputs.items():
            if isinstance(value, Tensor) and value.shape == batch["input_ids"].shape:  # others say "text": 0
                tail = extension.get(name, torch.zeros_like(answer_ids)).to(value.dtype)
                inputs[name] = torch.cat([value, tail], dim=1)
        layout = TokenLayout.from_input_ids(
            inputs["input_ids"], inputs["attention_mask"], self.visual_token_ids, answer_start=prompt_length
        )
        return Batch(inputs, layout)

    def _warn_if_question_precedes_image(
        self, prompts: Sequence[str], questions: Sequence[str], rows: Sequence[Sequence[Image]]
    ) -> None:
        for prompt, question, row in zip(prompts, questions, rows, strict=True):
            if not row:
                continue
            placeholder = getattr(self.processor, "image_token", None)
            if placeholder and question.strip() and prompt.rfind(placeholder) > prompt.rfind(question.strip()) >= 0:
                warnings.warn(
                    "the prompt puts the question before the image: text after the image is the template only, so text "
                    "status and cross attention do not see the question",
                    stacklevel=3,
                )
                return


# ------------------------------------------------------------ parts of the model


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        raise ModelError(f"{type(model).__name__} is not a transformers model")
    return config.get_text_config(decoder=True)


def _visual_token_ids(model: nn.Module, processor: Any) -> tuple[int, ...]:
    """Placeholder ids, the image's first: from the config, else from the processor."""
    config: Any = model.config
    found = [getattr(config, name, None) for name in ("image_token_id", "image_token_index")]
    found.append(getattr(processor, "image_token_id", None))
    image_ids = [each for each in found if isinstance(each, int) and each >= 0]
    if not image_ids:
        raise ModelError(
            f"{type(model).__name__} (model type {config.model_type!r}) has no image token: dyvte needs a multimodal "
            "LLM that puts visual tokens into the sequence of its decoder"
        )
    video = [getattr(config, name, None) for name in ("video_token_id", "video_token_index")]
    video_ids = [each for each in video if isinstance(each, int) and each >= 0]
    return tuple(dict.fromkeys([image_ids[0], *video_ids]))


def _find_decoder(model: nn.Module, text_config: Any) -> tuple[nn.Module, nn.ModuleList]:
    """The text decoder stack and its layers.

    `get_decoder()` may return the stack, a causal LM around it, or the whole model with its vision tower, so the list
    of `num_hidden_layers` decoder layers is looked for below it, first where the config is the decoder's.
    """
    get_decoder = getattr(model, "get_decoder", None)
    root = get_decoder() if get_decoder is not None else model
    candidates = [
        (module, child)
        for module in root.modules()
        for child in module.children()
        if isinstance(child, nn.ModuleList) and len(child) == text_config.num_hidden_layers and _is_decoder(child)
    ]
    if not candidates:
        raise ModelError(
            f"{type(model).__name__}: found no list of {text_config.num_hidden_layers} decoder layers below "
            f"{type(root).__name__}"
        )
    text_type = text_config.model_type
    of_text = [pair for pair in candidates if getattr(getattr(pair[0], "config", None), "model_type", "") == text_type]
    decoder, layers = (of_text or candidates)[0]
    for index, layer in enumerate(layers):
        crossing = [name for name, _ in layer.named_children() if "cross_attn" in name or "crossattention" in name]
        if crossing:
            raise ModelError(
                f"{type(model).__name__}: decoder layer {index} reads the image through {crossing[0]}; dyvte needs "
                "visual tokens in the sequence of the decoder"
            )
    return decoder, layers


def _is_decoder(layers: nn.ModuleList) -> bool:
    return any(_self_attention(layer) is not None for layer in layers)


def _self_attention(layer: nn.Module) -> nn.Module | None:
    """The self-attention module among the children of a decoder layer."""
    for name in ("self_attn", "self_attention", "attention", "attn"):
        module = getattr(layer, name, None)
        if isinstance(module, nn.Module):
            return module
    return None


# -------------------------------------------------------------- inputs and outputs


def _image_rows(images: Sequence[Image | Sequence[Image] | None] | None, questions: Sequence[str]) -> list[list[Image]]:
    if isinstance(questions, str):
        raise TypeError("questions must be a list of strings, one a sample, not a single string")
    if images is None:
        images = [None] * len(questions)
    if len(images) != len(questions):
        raise ValueError(f"got {len(images)} entries of images for {len(questions)} questions; give one a question")
    return [[] if entry is None else list(entry) if isinstance(entry, (list, tuple)) else [entry] for entry in images]


def _end_token_ids(model: Any) -> list[int]:
    end = model.generation_config.eos_token_id
    return [] if end is None else list(end) if isinstance(end, (list, tuple)) else [end]


def _cut_after_end(ids: list[int], end_ids: Sequence[int]) -> list[int]:
    ends = [index for index, token in enumerate(ids) if token in end_ids]
    return ids[: ends[0] + 1] if ends else ids
