"""Weight files read and written one tensor at a time, so that a checkpoint of any size needs little memory."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from dyvte.conversion.export_visual_tokens import DTYPES, safetensors_header
from dyvte.errors import ModelError
from dyvte.stored_files import check_safetensors, indexed_files

_STORED_DTYPES = {name: dtype for dtype, name in DTYPES.items()}


class WeightFile:
    """One file of weights: safetensors, or what `torch.save` wrote (read without running any code in it)."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def tensors(self) -> dict[str, StoredTensor]:
        """What the file holds, by name; nothing but tensors of known types is accepted."""
        if self.path.suffix != ".safetensors":
            return {name: StoredTensor(self, name, tuple(t.shape), t.dtype) for name, t in self._loaded.items()}
        found = check_safetensors(self.path)
        unknown = [f"{name} is {dtype}" for name, (dtype, _) in found.items() if dtype not in _STORED_DTYPES]
        if unknown:
            raise ModelError(f"{self.path}: numbers of a type that is not known here ({unknown[0]})")
        return {
            name: StoredTensor(self, name, tuple(shape), _STORED_DTYPES[dtype])
            for name, (dtype, shape) in found.items()
        }

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU."""
        if self.path.suffix != ".safetensors":
            return self._loaded[name]
        with safe_open(self.path, framework="pt") as file:
            return file.get_tensor(name)

    def close(self) -> None:
        """Let go of what is in memory."""
        vars(self).pop("_loaded", None)

    @cached_property
    def _loaded(self) -> dict[str, Tensor]:
        try:
            try:
                content: Any = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError:  # the format before PyTorch 1.6 cannot be mapped into memory
                content = torch.load(self.path, map_location="cpu", weights_only=True)
        except Exception as error:
            reason = " ".join(str(error).split())[:120]
            raise ModelError(f"{self.path}: not a file of weights alone ({reason})") from error
        if not isinstance(content, dict):
            raise ModelError(f"{self.path}: holds a {type(content).__name__}, not weights by name")
        return {str(name): each for name, each in content.items() if isinstance(each, Tensor)}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file of weights, not read yet."""

    file: WeightFile
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


def weight_files(folder: Path) -> list[WeightFile]:
    """The weight files of a folder in Hub layout, safetensors where there are both kinds."""
    for index in [*folder.glob("*.safetensors.index.json"), *folder.glob("*.bin.index.json")]:
        return [WeightFile(file) for file in indexed_files(index)]
    for pattern in ("model*.safetensors", "*.safetensors", "pytorch_model*.bin", "*.bin"):
        found = sorted(file for file in folder.glob(pattern) if file.name != "training_args.bin")
        if found:
            return [WeightFile(file) for file in found]
    raise ModelError(f"{folder}: no weights (*.safetensors or *.bin)")


@dataclass(frozen=True)
class Entry:
    """One tensor to write: what `make` makes of a stored one when its turn comes, by default itself."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    origin: StoredTensor
    make: Callable[[Tensor], Tensor] = lambda stored: stored

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_shards(folder: Path, entries: Iterable[Entry], shard_bytes: int) -> Iterator[int]:
    """Write tensors as `model-*.safetensors` with an index, one in memory at a time; yields the bytes of each."""
    shards: list[list[Entry]] = [[]]
    for entry in entries:
        if shards[-1] and sum(each.nbytes for each in shards[-1]) + entry.nbytes > shard_bytes:
            shards.append([])
        shards[-1].append(entry)
    index: dict[str, str] = {}
    opened: WeightFile | None = None
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        index |= {entry.name: name for entry in shard}
        with (folder / name).open("wb") as out:
            out.write(safetensors_header((each.name, each.dtype, each.shape, each.nbytes) for each in shard))
            for entry in shard:
                if opened is not None and opened is not entry.origin.file:
                    opened.close()
                opened = entry.origin.file
                tensor = entry.make(opened.read(entry.origin.name)).to(entry.dtype).contiguous()
                if tuple(tensor.shape) != entry.shape:
                    raise ModelError(f"{entry.name} came out as {tuple(tensor.shape)}, not {entry.shape}")
                out.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
                del tensor
                yield entry.nbytes
    if opened is not None:
        opened.close()
    if len(shards) > 1:
        size = sum(entry.nbytes for shard in shards for entry in shard)
        content = {"metadata": {"total_size": size}, "weight_map": dict(sorted(index.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(content, indent=1) + "\n")
