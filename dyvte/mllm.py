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
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dyvte.errors import ModelError, UnsupportedError
from dyvte.layout import TokenLayout

SHIPPED_MODELS = {"llava_shapes": Path(__file__).parent / "testbed" / "weights"}
"""Models that come with the package, by the name that `load` knows them under."""

IGNORE_INDEX = -100
"""Padding of answer ids and labels, as in `torch.nn.CrossEntropyLoss`."""

Image = Any  # PIL.Image.Image; Pillow is only needed by whoever opens the images


class Batch(dict[str, Any]):
    """Model inputs, to be passed as `model(**batch)`, with the role of every position in `layout`."""

    layout: TokenLayout

    def __init__(self, inputs: dict[str, Any], layout: TokenLayout) -> None:
        super().__init__(inputs)
        self.layout = layout

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in self.items()}
        return Batch(moved, self.layout.to(device))

    def left_padded(self) -> Batch:
        """The same batch with its padding moved to the left, where `generate` needs it."""
        return self._rolled((~self.layout.padding).flip(1).int().argmax(1))

    def right_padded(self) -> Batch:
        """The same batch with its padding moved to the right."""
        return self._rolled(-self.layout.first_token)

    def _rolled(self, shift: Tensor) -> Batch:
        """The batch with row b moved `shift[b]` positions to the right, wrapping around."""
        if not shift.any():
            return self
        length = self["input_ids"].shape[1]
        columns = (torch.arange(length, device=shift.device) - shift[:, None]) % length
        rolled = dict(self)
        for name, value in self.items():
            if isinstance(value, Tensor) and value.shape == self["input_ids"].shape:
                rolled[name] = value.gather(1, columns.to(value.device))
        return Batch(rolled, TokenLayout(self.layout.roles.gather(1, columns)))


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
        answers: Sequence[str] | None = None,
        padding_side: str = "left",
    ) -> Batch:
        """Turn images and questions into a batch, through the processor's chat template.

        Args:
            images: one entry a question: an image, a list of images, or None for a text-only prompt. None for all.
            questions: one a sample. The images come before the text of the question.
            answers: teacher-forced after the prompt, each followed by the end token; their positions are `answer`.
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

    def answer_ids(self, questions: Sequence[str], answers: Sequence[str]) -> Tensor:
        """Ids [B, A] of the answers as they follow the prompts, end token included, -100 at padding."""
        self._require_processor()
        rows = []
        for question, answer in zip(questions, answers, strict=True):
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


def wrap(model: nn.Module, processor: Any = None) -> MLLM:
    """Use a model that is already in memory; `processor` may be None when inputs are prepared elsewhere.

    Raises:
        ModelError: the model is not a decoder-only multimodal LLM with visual tokens in its sequence.
    """
    if processor is not None:
        _complete_processor(processor, model)
    return MLLM(model, processor)


def load(
    name_or_path: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    device_map: Any = None,
    attn_implementation: str | None = None,
    quantization_config: Any = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
    exported: str | Path | None = None,
    **model_kwargs: Any,
) -> MLLM:
    """Load a multimodal LLM and its processor. Weights are read from safetensors files only.

    (With `exported`, also from the `.bin` files of a fork's checkpoint: tensors alone, no code.)

    Args:
        name_or_path: a shipped model ("llava_shapes"), a local folder in Hub layout, or a Hub id.
        device: where the model goes; default the GPU if there is one. Leave it out with `device_map`.
        dtype: floating-point type ("auto": as stored).
        device_map: passed to `from_pretrained`, for models spread over devices.
        attn_implementation: passed to `from_pretrained`: "sdpa", "eager", "flash_attention_2", ...
        quantization_config: passed to `from_pretrained`.
        trust_remote_code: run code from the model's repository.
        revision: branch, tag or commit of a Hub id. The attribute `commit` of what is returned says what it stood for.
        token: Hub token; by default the one of `hf auth login`.
        exported: folder that `dyvte/export_visual_tokens.py` wrote; NAME_OR_PATH is then the checkpoint whose language
            model gets those visual tokens (see `dyvte.exported`).
        **model_kwargs: passed to `from_pretrained`.

    Raises:
        ModelError: with one line that says what is wrong and what to do.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText

    import dyvte.conversion.downsample  # noqa: F401  (makes a model known to transformers)

    for name, value in (
        ("device_map", device_map),
        ("attn_implementation", attn_implementation),
        ("quantization_config", quantization_config),
    ):
        if value is not None:
            model_kwargs[name] = value
    place = str(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if quantization_config is not None:  # quantized weights are not moved afterwards
        model_kwargs.setdefault("device_map", {"": place})
    if exported is not None:
        from dyvte.exported import load_language_model

        with _OneLineErrors(str(name_or_path)):
            model, processor = load_language_model(
                str(name_or_path), exported, revision=revision, token=token, dtype=dtype, **model_kwargs
            )
    else:
        source, hub_kwargs = _resolve_source(str(name_or_path), revision, token)
        hub_kwargs["trust_remote_code"] = trust_remote_code
        with _OneLineErrors(str(name_or_path)):
            _refuse_forks(str(name_or_path), source, hub_kwargs)
            config = AutoConfig.from_pretrained(source, **hub_kwargs)
        _check_config(str(name_or_path), config)
        if getattr(config, "quantization_config", None) is not None:  # stored that way
            model_kwargs.setdefault("device_map", {"": place})
        model_kwargs.setdefault("use_safetensors", True)
        with _OneLineErrors(str(name_or_path)):
            model = AutoModelForImageTextToText.from_pretrained(
                source, config=config, dtype=dtype, **hub_kwargs, **model_kwargs
            )
            processor = _load_processor(source, hub_kwargs)
    if "device_map" not in model_kwargs:
        model = model.to(place)
    mllm = wrap(model, processor)
    mllm.commit = _cached_commit(str(name_or_path), revision)
    return mllm


# ---------------------------------------------------------------------- loading


class _OneLineErrors:
    """Turn what transformers raises while it loads NAME into a `ModelError` of one line."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, ModelError) or not isinstance(error, (OSError, ValueError, KeyError, ImportError)):
            return
        raise ModelError(f"cannot load {self.name!r}: {_explain(error)}") from None


GATED_HINT = "it is gated; accept its terms on its Hub page, then run `hf auth login`"


def _explain(error: BaseException) -> str:
    from huggingface_hub.errors import GatedRepoError, HFValidationError

    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    text = " ".join(str(error).split())
    if any(isinstance(each, GatedRepoError) for each in chain) or "gated repo" in text:
        return GATED_HINT
    if "trust_remote_code" in text:
        return (
            "it needs code from its own repository; read that code, then set trust_remote_code=true (on the command "
            "line model.trust_remote_code=true, with model.revision=COMMIT for the code that was read)"
        )
    if any(isinstance(each, HFValidationError) for each in chain):
        return "no such folder here, and it is not a Hub id of the form owner/name"
    if "no file named" in text or "with `safetensors`" in text:
        return f"the weights are missing (safetensors files, no others are read); {_first_sentence(text)}"
    return _first_sentence(text)


def _first_sentence(text: str, limit: int = 300) -> str:
    sentence = text.split(". ")[0]
    return sentence if len(sentence) <= limit else sentence[:limit] + "..."


def _resolve_source(name: str, revision: str | None, token: str | bool | None) -> tuple[str, dict[str, Any]]:
    """The folder or Hub id to load NAME from, with keyword arguments for `from_pretrained`."""
    folder = SHIPPED_MODELS.get(name) or Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(f"cannot load {name!r}: {folder} holds no config.json; give a folder in Hub layout")
        return str(folder), {"local_files_only": True}
    if name in SHIPPED_MODELS:
        raise ModelError(
            f"cannot load {name!r}: its weights are not in {folder}; train it with `python -m dyvte.testbed.train` "
            "or install a complete copy of dyvte"
        )
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).exists():
        raise ModelError(f"cannot load {name!r}: there is no such folder; give a folder in Hub layout or a Hub id")
    kwargs = {"revision": revision, "token": token}
    kwargs = {key: value for key, value in kwargs.items() if value is not None}
    if not _hub_answers(name, kwargs):
        from huggingface_hub import try_to_load_from_cache

        if not isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
            pinned = "" if revision is None else f" --revision {revision}"
            raise ModelError(
                f"cannot load {name!r}: the Hugging Face Hub cannot be reached and nothing is cached here; run "
                f"`hf download {name}{pinned}` where there is a network, or give a local folder (model.path=FOLDER)"
            )
        return name, {**kwargs, "local_files_only": True}
    return name, kwargs


def _cached_commit(name: str, revision: str | None) -> str | None:
    """The commit of a Hub id's files in the cache, by which the cache names its folder; None for other models."""
    from huggingface_hub import try_to_load_from_cache

    if name in SHIPPED_MODELS or Path(name).expanduser().is_dir():
        return None
    file = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(file).parent.name if isinstance(file, str) else None


def _hub_answers(name: str, kwargs: dict[str, Any]) -> bool:
    """Whether the Hub has NAME; False when it cannot be reached. One request, no retries."""
    import huggingface_hub
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if huggingface_hub.constants.is_offline_mode():
        return False
    try:
        huggingface_hub.model_info(name, timeout=10, **kwargs)
    except HFValidationError:
        raise ModelError(
            f"cannot load {name!r}: there is no such folder, and a Hub id has the form owner/name"
        ) from None
    except RevisionNotFoundError:
        raise ModelError(f"cannot load {name!r}: the Hub has no revision {kwargs.get('revision')!r} of it") from None
    except GatedRepoError:  # a kind of RepositoryNotFoundError
        raise ModelError(f"cannot load {name!r}: {GATED_HINT}") from None
    except RepositoryNotFoundError:
        raise ModelError(
            f"cannot load {name!r}: the Hub has no such model, or it is private (then run `hf auth login`)"
        ) from None
    except Exception:  # whatever the HTTP client raises without a connection
        return False
    return True


def _refuse_forks(name: str, source: str, hub_kwargs: dict[str, Any]) -> None:
    """Say what to do with a checkpoint of the LLaVA code base, which transformers reads wrongly or not at all."""
    from transformers import PreTrainedConfig

    content, _ = PreTrainedConfig.get_config_dict(source, **hub_kwargs)
    if any(key in content for key in ("mm_vision_tower", "mm_projector_cfg", "mm_projector_type")):
        raise ModelError(
            f"cannot load {name!r}: a checkpoint of the LLaVA code base; convert it with `python -m dyvte.convert "
            f"{name} FOLDER` or export its visual tokens (docs/how_to_llava_forks.md)"
        )


def _check_config(name: str, config: Any) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    remote_classes = getattr(config, "auto_map", None) or {}
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING or "AutoModelForImageTextToText" in remote_classes:
        return
    raise ModelError(
        f"cannot load {name!r}: model type {config.model_type!r} is not an image-text-to-text model of transformers; "
        "dyvte needs a multimodal LLM such as llava-hf/llava-1.5-7b-hf"
    )


def _load_processor(source: str, hub_kwargs: dict[str, Any]) -> Any:
    """The processor, or None where the model comes without one."""
    from transformers import AutoProcessor
    from transformers.utils import is_torchvision_available

    try:
        processor = AutoProcessor.from_pretrained(source, **hub_kwargs)
    except (OSError, ValueError, ImportError, AttributeError) as error:
        # Without torchvision transformers fails in several ways, also where it is only needed for videos.
        if isinstance(error, (ImportError, AttributeError)) and not is_torchvision_available():
            raise ModelError(
                f"cannot load the processor of {source}: it needs torchvision; run pip install 'dyvte[models]'"
            ) from error
        if isinstance(error, AttributeError):
            raise
        warnings.warn(f"no processor in {source}: {_explain(error)}; only batch() will work", stacklevel=3)
        return None
    if getattr(processor, "tokenizer", None) is None or getattr(processor, "image_processor", None) is None:
        warnings.warn(f"{source} has no processor for images and text; only batch() will work", stacklevel=3)
        return None
    return processor


def _complete_processor(processor: Any, model: nn.Module) -> None:
    """Fill in what checkpoints saved by older releases lack: padding token, patch size, feature selection."""
    tokenizer = processor.tokenizer
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    config: Any = model.config
    if getattr(processor, "patch_size", 0) is None:
        processor.patch_size = config.vision_config.patch_size
    if getattr(processor, "vision_feature_select_strategy", "") is None:
        processor.vision_feature_select_strategy = config.vision_feature_select_strategy
        # CLIP adds a class token to the patches, which the "default" strategy drops again.
        processor.num_additional_image_tokens = 1 if config.vision_config.model_type == "clip_vision_model" else 0


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
