"""Loading multimodal LLMs and finding their parts.

Everything that the toolkit needs to know about a model family (decoder layers, self-attention modules, image token
id, head layout, prompt format) is read from the model, its config and its processor. A family that follows the
image-text-to-text protocol of transformers needs no code here.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from dyvte.batch import Batch, Image, Media, image_rows, padded_answers, warn_if_question_precedes_image
from dyvte.data.chat import Chat, split_chat
from dyvte.data.video import MAX_FRAMES
from dyvte.errors import DyvteWarning, ModelError, UnsupportedError
from dyvte.layout import TokenLayout
from dyvte.model_parts import (
    EACH_ALONE,
    RUNNING_STATE,
    VISUAL_MARKS,
    check_nature,
    find_decoder,
    inner_models,
    layer_kinds,
    output_embeddings_of,
    self_attention_of,
    text_config_of,
    visual_token_ids_of,
)

NO_TOKEN = -1
"""Id of no token."""


class MLLM:
    """A multimodal LLM with its parts found: use `load` or `wrap` to make one.

    Attributes:
        model: the `...ForConditionalGeneration` model, in eval mode.
        processor: its processor, or None (then only `batch` works, not `encode`).
        decoder: the text decoder stack, owner of `layers`, the final norm and the rotary embedding.
        layers: the L decoder layers.
        lm_head: the output embedding module.
        text_config: config of the decoder.
        image_token_id: id of the placeholder that stands for one visual token; -1 where there is none and the inputs
            mark the visual positions.
        visual_token_ids: all placeholder ids that count as visual (image and, where there is one, video).
        commit: of the Hub repository that `load` read; None where the model did not come from the Hub.

    Example:
        >>> mllm = dyvte.load("llava_shapes", device="cpu")
        >>> batch = mllm.encode(images=[sample.image], questions=[sample.question])
        >>> len(mllm.generate(batch)), mllm(**batch).logits.shape[0]
        (1, 1)
    """

    commit: str | None = None

    def __init__(self, model: Any, processor: Any = None) -> None:
        self.model: Any = model.eval()
        self.processor = processor
        self.text_config = text_config_of(model)
        check_nature(model)
        self.visual_token_ids = visual_token_ids_of(model, processor)
        self.image_token_id = self.visual_token_ids[0] if self.visual_token_ids else NO_TOKEN
        self.decoder, self.layers = find_decoder(model, self.text_config)
        self.lm_head: Any = output_embeddings_of(model)
        if self.lm_head is None:
            name = type(model).__name__
            raise ModelError(f"{name} has no output embeddings: load the ...ForConditionalGeneration class")

    def __repr__(self) -> str:
        name = type(self.model).__name__
        return f"MLLM({name}, {self.num_layers} layers, {self.num_heads} heads, hidden size {self.hidden_size})"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward pass: `mllm(**batch)`."""
        return self.model(*args, **kwargs)

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
        """H, the number of query heads; the most that a layer has where they differ."""
        per_layer = getattr(self.text_config, "per_layer_config", None)
        of_layers = [per_layer[index] for index in range(self.num_layers)] if per_layer else [self.text_config]
        return max(each.num_attention_heads for each in of_layers)

    @property
    def device(self) -> torch.device:
        """Where inputs go: the device of the input embeddings, or the one that runs them where they are offloaded."""
        embeddings = self.model.get_input_embeddings()
        device = embeddings.weight.device
        if device.type != "meta":
            return device
        runs_on = getattr(getattr(embeddings, "_hf_hook", None), "execution_device", None)
        if runs_on is not None:
            return torch.device(runs_on)
        return next((p.device for p in self.model.parameters() if p.device.type != "meta"), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the model."""
        return self.model.dtype

    @cached_property
    def attentions(self) -> list[nn.Module | None]:
        """The self-attention module of every decoder layer, in layer order; None for a layer that does not attend.

        Hybrid models have such layers: linear attention, state spaces, convolutions, a mixture of experts by itself.

        Raises:
            UnsupportedError: a layer has none and is not of a kind that dyvte knows.
        """
        found: list[nn.Module | None] = []
        for index, (layer, kind) in enumerate(zip(self.layers, layer_kinds(self.text_config), strict=True)):
            module = None if kind in RUNNING_STATE + EACH_ALONE else self_attention_of(layer)
            if module is None and kind not in RUNNING_STATE + EACH_ALONE:
                raise UnsupportedError(
                    f"{type(self.model).__name__}: decoder layer {index} ({type(layer).__name__}) has no "
                    f"self-attention module, and {kind!r} is not a kind of layer that dyvte can run without one"
                )
            found.append(module)
        return found

    @property
    def attention_layers(self) -> list[int]:
        """The decoder layers that attend: all but those of hybrid models that carry a running state."""
        return [index for index, module in enumerate(self.attentions) if module is not None]

    def attention_of(self, layer: int) -> nn.Module:
        """The self-attention module of one decoder layer.

        Raises:
            UnsupportedError: it has none.
        """
        module = self.attentions[layer]
        if module is None:
            raise UnsupportedError(
                f"decoder layer {layer} of {type(self.model).__name__} does not attend: choose one of layers "
                f"{', '.join(map(str, self.attention_layers))}"
            )
        return module

    # ------------------------------------------------------------------ inputs

    def layout(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        marks: Tensor | None = None,
        answer_start: int | None = None,
    ) -> TokenLayout:
        """Roles of the positions of a prompt, from its ids [B, N] (all text after the image is `instruction`).

        Args:
            input_ids: [B, N].
            attention_mask: [B, N], 0 at padding.
            marks: [B, N], 1 where a visual token stands, for a model that has no image token (Kosmos-2).
            answer_start: index of the first answer position, None without an answer.
        """
        ids, visual_ids = (input_ids, self.visual_token_ids) if marks is None else (marks.long(), (1,))
        return TokenLayout.from_input_ids(ids, attention_mask, visual_ids, answer_start)

    def batch(self, **model_inputs: Any) -> Batch:
        """Model inputs prepared elsewhere, moved to the model's device and floating-point type.

        Raises:
            ValueError: there are no `input_ids` (roles cannot be told from embeddings).
        """
        if model_inputs.get("input_ids") is None:
            raise ValueError("batch() needs input_ids: the roles of the tokens are found from them")
        inputs = {name: self._place(value) for name, value in model_inputs.items()}
        return Batch(inputs, self.layout(inputs["input_ids"], inputs.get("attention_mask"), inputs.get(VISUAL_MARKS)))

    def encode(
        self,
        images: Sequence[Media | None] | None,
        questions: Sequence[str],
        answers: Sequence[str | None] | None = None,
        padding_side: str = "left",
    ) -> Batch:
        """Turn images and questions into a batch, through the processor's chat template.

        Args:
            images: one entry a question: an image, a `dyvte.data.video.Video`, a list of them, or None for a text-only
                prompt. None for all.
            questions: one a sample. Images, then videos, come before the text of the question.
            answers: teacher-forced after the prompt, each followed by the end token; their positions are `answer`.
                None for samples without one.
            padding_side: "left" (what generation needs) or "right".
        """
        self._require_processor()
        rows, films = image_rows(images, questions)
        kinds = [["image"] * len(row) + ["video"] * len(film) for row, film in zip(rows, films, strict=True)]
        prompts = [self._prompt(question, media) for question, media in zip(questions, kinds, strict=True)]
        batch = self._processed(prompts, rows, padding_side, films)
        warn_if_question_precedes_image(getattr(self.processor, "image_token", None), prompts, questions, rows)
        return batch if answers is None else self.append_answers(batch, self.answer_ids(questions, answers))

    def encode_chats(self, chats: Sequence[Chat], padding_side: str = "left", max_frames: int = MAX_FRAMES) -> Batch:
        """Turn conversations of several turns, with images and videos anywhere in them, into a batch.

        Args:
            chats: each a list of messages (see `dyvte.data.chat.Chat`), the last one to be answered. Videos are frames
                or files; only families whose processor has a video processor take them.
            padding_side: "left" (what generation needs) or "right".
            max_frames: the most frames that are read of a file, evenly spread.

        Raises:
            ModelError: no chat template, other content than text, image and video, or a video that nothing reads.

        Example:
            >>> show = {"type": "image", "image": sample.image}
            >>> ask = {"role": "user", "content": [show, {"type": "text", "text": sample.question}]}
            >>> again = {"role": "user", "content": sample.question}
            >>> batch = mllm.encode_chats([[ask, {"role": "assistant", "content": "yes"}, again]])
            >>> int(batch.layout.visual.sum())
            144
        """
        processor = self._require_processor()
        if not getattr(processor, "chat_template", None):
            raise ModelError(f"{type(processor).__name__} has no chat template, which conversations need")
        found = [split_chat(chat, max_frames) for chat in chats]
        prompts = [processor.apply_chat_template(each.messages, add_generation_prompt=True) for each in found]
        return self._processed(prompts, [each.images for each in found], padding_side, [each.videos for each in found])

    def answer_ids(self, questions: Sequence[str], answers: Sequence[str | None]) -> Tensor:
        """Ids [B, A] of the answers as they follow the prompts, end token included, -100 at padding and for None."""
        self._require_processor()
        rows: list[list[int]] = []
        for question, answer in zip(questions, answers, strict=True):
            if answer is None:
                rows.append([])
                continue
            prompt = self._prompt(question)
            before = self._tokenize(prompt)
            joint = self._tokenize(prompt + self._answer_separator(question, prompt) + answer)
            # A tokenizer may merge the end of the prompt with the answer; then the answer is tokenized on its own.
            ids = joint[len(before) :] if joint[: len(before)] == before else self._tokenize(answer)
            rows.append([*ids, self.tokenizer.eos_token_id])
        return padded_answers(rows).to(self.device)

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
        settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": 64} | kwargs
        given = kwargs.get("generation_config")
        end_ids = _as_ids(kwargs.get("eos_token_id", getattr(given, "eos_token_id", None)))
        end_ids = end_ids or _as_ids(self.model.generation_config.eos_token_id)
        inputs = dict(batch.left_padded())
        if "mm_encoder_outputs" in inputs:  # beam search repeats in place what these hold
            inputs["mm_encoder_outputs"] = {
                kind: copy.copy(output) for kind, output in inputs["mm_encoder_outputs"].items()
            }
        with self._plain_generation():
            generated = self.model.generate(**inputs, **settings)
        sequences = getattr(generated, "sequences", generated)[:, inputs["input_ids"].shape[1] :]
        return [_cut_after_end(row.tolist(), [*end_ids, *self.visual_token_ids]) for row in sequences]

    @contextmanager
    def _plain_generation(self) -> Iterator[None]:
        """Within the block nothing of the checkpoint's generation settings is left but its special tokens.

        A repetition penalty, beams or suppressed tokens that a Hub checkpoint brings are not the user's wishes: greedy
        is the most likely token of the model itself, which is what labels and agreement compare with.
        """
        own = self.model.generation_config
        pad_id = own.pad_token_id
        if pad_id is None:  # else transformers chooses one, warning at every call
            ends = _as_ids(own.eos_token_id)
            pad_id = getattr(self.tokenizer, "pad_token_id", None)
            pad_id = pad_id if pad_id is not None else ends[0] if ends else 0
        special = {
            name: getattr(own, name, None) for name in ("bos_token_id", "eos_token_id", "decoder_start_token_id")
        }
        plain = GenerationConfig(pad_token_id=pad_id, **special)
        owners = [self.model, *inner_models(self.model)]
        before = [owner.generation_config for owner in owners]
        for owner in owners:
            owner.generation_config = plain
        try:
            yield
        finally:
            for owner, config in zip(owners, before, strict=True):
                owner.generation_config = config

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """Generated ids as text, without special tokens."""
        self._require_processor()
        return [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def _place(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(self.device, self.dtype if value.is_floating_point() else None)

    def _processed(
        self,
        prompts: Sequence[str],
        rows: Sequence[Sequence[Image]],
        padding_side: str,
        videos: Sequence[Sequence[Any]],
    ) -> Batch:
        """Prompts with placeholders as a batch, each with its images and videos."""
        processor, bos = self.processor, self.tokenizer.bos_token
        if any(videos) and getattr(processor, "video_processor", None) is None:
            raise ModelError(f"{type(processor).__name__} reads no videos: give some of their frames as images")
        media = {"videos": [film for each in videos for film in each]} if any(videos) else {}
        inputs = processor(
            text=prompts,
            images=rows if any(rows) else None,
            padding=True,
            padding_side=padding_side,
            add_special_tokens=not (bos and prompts[0].startswith(bos)),
            return_tensors="pt",
            **media,
        )
        batch = self.batch(**inputs)
        batch.images = None if media else tuple(len(row) for row in rows)
        expected = torch.tensor(
            [bool(row or film) for row, film in zip(rows, videos, strict=True)], device=batch.layout.roles.device
        )
        if not torch.equal(batch.layout.has_image, expected):
            raise ModelError(
                f"{type(processor).__name__} put no image token (id {self.image_token_id}) where an image was given: "
                "its chat template or its image token does not fit the model"
            )
        return batch

    def _require_processor(self) -> Any:
        if self.processor is None:
            raise ModelError("this MLLM has no processor: use dyvte.wrap(model, processor), or batch() with token ids")
        return self.processor

    def _prompt(self, question: str, media: Sequence[str] = (), answer: str | None = None) -> str:
        if getattr(self.processor, "chat_template", None):
            content = [*({"type": kind} for kind in media), {"type": "text", "text": question}]
            messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
            if answer is not None:
                messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
            return self.processor.apply_chat_template(messages, add_generation_prompt=answer is None)
        if self.model.config.model_type != "llava":
            raise ModelError(
                f"{type(self.processor).__name__} has no chat template, so how {self.model.config.model_type} is asked "
                "is unknown: put the chat_template.jinja of the original checkpoint into the model's folder"
            )
        warnings.warn(
            "the processor has no chat template: asking in the format of LLaVA-1.5", DyvteWarning, stacklevel=2
        )
        images = f"{self.processor.image_token}\n" * len(media)
        return f"USER: {images}{question} ASSISTANT:" + ("" if answer is None else f" {answer}")

    def _answer_separator(self, question: str, prompt: str) -> str:
        """What the prompt format puts between a prompt and its answer (a space in LLaVA-1.5's)."""
        marker = "\N{BULLET}answer\N{BULLET}"
        rendered = self._prompt(question, answer=marker)
        if not rendered.startswith(prompt) or marker not in rendered:
            return ""
        return rendered[len(prompt) :].partition(marker)[0]

    def _tokenize(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def append_answers(self, batch: Batch, answer_ids: Tensor) -> Batch:
        """Teacher-force answers [B, A], -100 at padding, behind the prompts of a batch."""
        prompt_length = batch["input_ids"].shape[1]
        inputs = batch.followed_by(answer_ids)
        layout = self.layout(
            inputs["input_ids"], inputs["attention_mask"], inputs.get(VISUAL_MARKS), answer_start=prompt_length
        )
        return Batch(inputs, layout, batch.images)


def _as_ids(end: Any) -> list[int]:
    """Ids of end tokens, given as None, a number, a list or a tensor."""
    return [] if end is None else [int(each) for each in torch.as_tensor(end).flatten()]


def as_mllm(model: Any) -> MLLM:
    """An `MLLM` as it is; a transformers model, compiled or of PEFT or plain, wrapped and left in its mode.

    Raises:
        ModelError: it is neither.
    """
    if isinstance(model, MLLM):
        return model
    if not isinstance(model, nn.Module):
        raise ModelError(f"expected an MLLM or a transformers model, got {type(model).__name__}")
    training = model.training
    mllm = MLLM(model)
    model.train(training)
    return mllm


def _cut_after_end(ids: list[int], end_ids: Sequence[int]) -> list[int]:
    ends = [index for index, token in enumerate(ids) if token in end_ids]
    return ids[: ends[0] + 1] if ends else ids
