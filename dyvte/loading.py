"""Loading multimodal LLMs and their processors, by name, folder or Hub id."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    StrictDataclassError,
)
from safetensors import SafetensorError
from torch import nn

from dyvte.errors import DyvteWarning, ModelError, UnsupportedError
from dyvte.instrument.hooks import check_model
from dyvte.mllm import MLLM
from dyvte.stored_files import check_model_folder

SHIPPED_MODELS = {"llava_shapes": Path(__file__).parent / "testbed" / "weights"}
"""Models that come with the package, by the name that `load` knows them under."""


def wrap(model: nn.Module, processor: Any = None) -> MLLM:
    """Use a model that is already in memory; `processor` may be None when inputs are prepared elsewhere.

    A model whose layers cannot run on some positions only (Inkling convolves its keys) can still be looked at: a
    `DyvteWarning` says that of such a model only `AttentionProbe` is exact, and what drives layers refuses it.

    Raises:
        ModelError: the model is not a decoder-only multimodal LLM with visual tokens in its sequence.

    Example:
        >>> dyvte.wrap(mllm.model, mllm.processor).num_layers
        12
    """
    if processor is not None:
        _complete_processor(processor, model)
    mllm = MLLM(model, processor)
    try:
        check_model(mllm)
    except UnsupportedError as reason:
        warnings.warn(
            f"{type(model).__name__}: AttentionProbe works; policies, exit_sweep, knockout and logit_lens are refused: "
            f"{reason}",
            DyvteWarning,
            stacklevel=2,
        )
    return mllm


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
        name_or_path: a shipped model ("llava_shapes"; "llava_smol" after `make smol`), a local folder in Hub layout, or
            a Hub id.
        device: where the model goes; default the GPU if there is one. Leave it out with `device_map`.
        dtype: floating-point type ("auto": as stored).
        device_map: passed to `from_pretrained`, for models spread over devices.
        attn_implementation: passed to `from_pretrained`: "sdpa", "eager", "flash_attention_2", ...
        quantization_config: passed to `from_pretrained`.
        trust_remote_code: run code from the model's repository.
        revision: branch, tag or commit of a Hub id. The attribute `commit` of what is returned says what it stood for.
        token: Hub token; by default the one of `hf auth login`.
        exported: folder that `dyvte/conversion/export_visual_tokens.py` wrote; NAME_OR_PATH is then the checkpoint
            whose language model gets those visual tokens (see `dyvte.conversion.exported`).
        **model_kwargs: passed to `from_pretrained`.

    Raises:
        ModelError: with one line that says what is wrong and what to do.

    Example:
        >>> mllm = dyvte.load("llava_shapes", device="cpu")
        >>> mllm.num_layers
        12
    """
    from transformers import AutoConfig, AutoModelForImageTextToText

    import dyvte.conversion.downsample  # noqa: F401  (makes a model known to transformers)

    given = {
        "device_map": device_map,
        "attn_implementation": attn_implementation,
        "quantization_config": quantization_config,
    }
    model_kwargs |= {key: value for key, value in given.items() if value is not None}
    name = str(name_or_path)
    place = str(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if quantization_config is not None:  # quantized weights are not moved afterwards
        model_kwargs.setdefault("device_map", {"": place})
    if exported is not None:
        from dyvte.conversion.exported import load_language_model

        with _one_line_errors(name):
            model, processor = load_language_model(
                name, exported, revision=revision, token=token, dtype=dtype, **model_kwargs
            )
    else:
        source, hub_kwargs = _resolve_source(name, revision, token)
        hub_kwargs["trust_remote_code"] = trust_remote_code
        if Path(source).is_dir():
            check_model_folder(Path(source))
        with _one_line_errors(name):
            _refuse_forks(name, source, hub_kwargs)
            config = AutoConfig.from_pretrained(source, **hub_kwargs)
        _check_config(name, config)
        if attn_implementation is None:
            _refuse_kernels(name, config)
        if getattr(config, "quantization_config", None) is not None:  # stored that way
            model_kwargs.setdefault("device_map", {"": place})
        model_kwargs.setdefault("use_safetensors", True)
        with _one_line_errors(name):
            model, report = AutoModelForImageTextToText.from_pretrained(
                source, config=config, dtype=dtype, output_loading_info=True, **hub_kwargs, **model_kwargs
            )
            _check_weights(name, report)
            processor = _load_processor(source, hub_kwargs)
    if "device_map" not in model_kwargs:
        model = model.to(place)
    mllm = wrap(model, processor)
    mllm.commit = _cached_commit(name, revision)
    return mllm


LOADING_ERRORS = (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError, StrictDataclassError)


@contextmanager
def _one_line_errors(name: str) -> Iterator[None]:
    """Turn what transformers raises while it loads NAME into a `ModelError` of one line."""
    try:
        yield
    except ModelError:
        raise
    except LOADING_ERRORS as error:
        raise ModelError(f"cannot load {name!r}: {_explain(error)}") from None


LONGEST_SENTENCE = 300
GATED_HINT = "it is gated; accept its terms on its Hub page, then run `hf auth login`"


def _explain(error: BaseException) -> str:
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
    if isinstance(error, SafetensorError):
        return f"a file of its weights is damaged ({text}); download it again"
    if "ignore_mismatched_sizes" in text:
        return "its weights have other shapes than its config.json asks for; the two do not belong together"
    if "no file named" in text or "with `safetensors`" in text:
        return f"the weights are missing (safetensors files, no others are read); {_first_sentence(text)}"
    return _first_sentence(text)


def _first_sentence(text: str) -> str:
    sentence = text.split(". ")[0]
    return sentence if len(sentence) <= LONGEST_SENTENCE else sentence[:LONGEST_SENTENCE] + "..."


def _resolve_source(name: str, revision: str | None, token: str | bool | None) -> tuple[str, dict[str, Any]]:
    """The folder or Hub id to load NAME from, with keyword arguments for `from_pretrained`."""
    if name == "llava_smol" and not Path(name).is_dir():
        from dyvte.testbed.smol.assemble import assembled_folder, is_assembled

        if not is_assembled():
            raise ModelError(
                "cannot load 'llava_smol': it is not put together yet (its language model is fetched once, 98 MB); run "
                "`make smol`, or `dyvte smol` in an installed package"
            )
        return str(assembled_folder()), {"local_files_only": True}
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
    kwargs = {key: value for key, value in (("revision", revision), ("token", token)) if value is not None}
    if not _hub_answers(name, kwargs):
        if not isinstance(huggingface_hub.try_to_load_from_cache(name, "config.json", revision=revision), str):
            pinned = "" if revision is None else f" --revision {revision}"
            raise ModelError(
                f"cannot load {name!r}: the Hugging Face Hub cannot be reached and nothing is cached here; run "
                f"`hf download {name}{pinned}` where there is a network, or give a local folder (model.path=FOLDER)"
            )
        return name, {**kwargs, "local_files_only": True}
    return name, kwargs


def _cached_commit(name: str, revision: str | None) -> str | None:
    """The commit of a Hub id's files in the cache, by which the cache names its folder; None for other models."""
    if name in SHIPPED_MODELS or Path(name).expanduser().is_dir():
        return None
    file = huggingface_hub.try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(file).parent.name if isinstance(file, str) else None


def _hub_answers(name: str, kwargs: dict[str, Any]) -> bool:
    """Whether the Hub has NAME; False when it cannot be reached. One request, no retries."""
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


def _refuse_kernels(name: str, config: Any) -> None:
    """Refuse a config that names attention code on the Hub, which transformers would fetch and run."""
    for each in (config, *(getattr(config, part, None) for part in getattr(config, "sub_configs", ()))):
        kernel = getattr(each, "_attn_implementation", None)
        if isinstance(kernel, str) and "/" in kernel:
            raise ModelError(
                f"cannot load {name!r}: its config.json names attention code to fetch and run, {kernel!r}; take the "
                "line out, or say what to use (on the command line model.attn_implementation=sdpa)"
            )


def _check_weights(name: str, report: dict[str, Any]) -> None:
    """Refuse a checkpoint whose weights are not the model's: what is missing would be random numbers."""
    for kind, consequence in (
        ("missing_keys", "they would be random"),
        ("unexpected_keys", "the model has no place for them"),
        ("mismatched_keys", "they have another shape"),
    ):
        if keys := sorted(str(key) for key in report.get(kind) or ()):
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise ModelError(
                f"cannot load {name!r}: {kind.replace('_keys', '')} weights, {keys[0]}{more} ({consequence}); the "
                "checkpoint and its config.json do not belong together"
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
        warnings.warn(
            f"no processor in {source}: {_explain(error)}; only batch() will work", DyvteWarning, stacklevel=3
        )
        return None
    if getattr(processor, "tokenizer", None) is None or getattr(processor, "image_processor", None) is None:
        warnings.warn(
            f"{source} has no processor for images and text; only batch() will work", DyvteWarning, stacklevel=3
        )
        return None
    return processor


def _complete_processor(processor: Any, model: nn.Module) -> None:
    """Fill in what checkpoints saved by older releases lack: padding token, patch size, feature selection."""
    tokenizer = processor.tokenizer
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    config: Any = model.config
    if not getattr(processor, "chat_template", None) and getattr(tokenizer, "chat_template", None):
        processor.chat_template = tokenizer.chat_template
    if getattr(processor, "patch_size", 0) is None:
        processor.patch_size = config.vision_config.patch_size
    if getattr(processor, "vision_feature_select_strategy", "") is None:
        processor.vision_feature_select_strategy = config.vision_feature_select_strategy
        # CLIP adds a class token to the patches, which the "default" strategy drops again.
        processor.num_additional_image_tokens = 1 if config.vision_config.model_type == "clip_vision_model" else 0
