"""The run folder: what a command leaves on disk, and how it survives being killed.

    outputs/stages/llava_shapes/shapes/
        config.yaml          the composed configuration
        overrides.yaml       what was given on the command line
        fingerprint.json     what the results depend on: weights, data, settings
        shards/00000007/     one finished batch: its tables as Parquet, its failures, its time
        <table>.parquet .csv the shards' tables joined in order
        failures.jsonl       samples left out, with where and why
        figures/*.png *.pdf
        summary.json         every number that a figure shows

Whatever has its final name is complete: files and shards are written under a temporary name and renamed. A command
started again on its folder continues after the last finished batch; with another fingerprint it is refused. Several
processes may work in one folder: what one has finished the others take, and nobody deletes what another may be writing.
"""

from __future__ import annotations

import io
import json
import math
import platform
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from safetensors import safe_open
from safetensors.torch import save

from dyvte.errors import RunFolderError
from dyvte.runs import distributed
from dyvte.runs.fingerprint import fingerprint as fingerprint
from dyvte.runs.fingerprint import model_fingerprint as model_fingerprint
from dyvte.runs.locks import TEMPORARY, locked, temporary_name, use, write_atomic
from dyvte.version import __version__

if TYPE_CHECKING:
    from matplotlib.figure import Figure


_OWN_FOLDERS = ("shards", "figures", "gates", "tensorboard")
_OWN_FILES = (
    *("summary.json", "failures.jsonl", "config.yaml", "overrides.yaml", "calibration.json"),
    *("answers.jsonl", "table.md"),
)
"""What commands write beside their tables: `overwrite=true` deletes it, and nothing else."""

_LINE_BREAK = re.compile(r"\n\s*")
_INNERMOST_LIST = re.compile(r"\[\n\s*([^\[\]{}]*?)\n\s*\]")
ROWS_PER_GROUP = 1 << 17


def write_json(path: Path, content: Any) -> None:
    """Write `content` as strict JSON (NaN and infinities become null), atomically."""
    text = json.dumps(plain(content), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    # Lists of numbers go on one line; strings hold no line breaks, so nothing inside them can match.
    text = _INNERMOST_LIST.sub(lambda match: f"[{re.sub(_LINE_BREAK, ' ', match[1])}]", text)
    write_atomic(path, lambda file: file.write(text.encode()))


def plain(value: Any) -> Any:
    """`value` with numpy and torch numbers and arrays as Python ones, NaN and infinities as None."""
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, (np.ndarray, np.generic, torch.Tensor)):
        return plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _flat(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
    packages = ("torch", "transformers", "numpy", "scipy", "pandas", "pyarrow")
    return {
        "python": platform.python_version(),
        "dyvte": __version__,
        **{package: version(package) for package in packages},
    }


def overrides_of(config: DictConfig) -> list[str] | None:
    """What was given on the command line, or to `dyvte.runs.config.compose`; None where nobody knows."""
    if HydraConfig.initialized():
        return list(HydraConfig.get().overrides.task)
    return config.__dict__.get("dyvte_overrides")


def serialised(tables: Mapping[str, pd.DataFrame | dict[str, torch.Tensor]]) -> dict[str, bytes]:
    """Tables as the bytes of Parquet files, dicts of tensors as those of safetensors, by file name.

    What fits into no file raises a `ValueError` (pyarrow's errors are of this kind).
    """
    files = {}
    for name, content in tables.items():
        if isinstance(content, dict):
            files[f"{name}.safetensors"] = save(content)
        else:
            out = io.BytesIO()
            pq.write_table(pa.Table.from_pandas(content, preserve_index=False), out)
            files[f"{name}.parquet"] = out.getvalue()
    return files


def _read_record(file: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(file.read_text())
    except ValueError as error:
        raise RunFolderError(f"{file} is damaged: start again with overwrite=true") from error
    return content


class RunFolder:
    """A folder that holds one run. Use :meth:`open`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def open(
        cls,
        path: str | Path,
        run_fingerprint: Mapping[str, Any],
        config: DictConfig,
        overwrite: bool = False,
        remedy: str = "set output_dir=FOLDER to keep both, or overwrite=true to replace it",
    ) -> RunFolder:
        """Start a run in `path`, or continue the one that is there.

        Args:
            path: created where it does not exist.
            run_fingerprint: from :func:`fingerprint`.
            config: the composed configuration, saved as `config.yaml`.
            overwrite: delete the results of an earlier run first.
            remedy: what the error says to do where the folder holds another run.

        Raises:
            RunFolderError: the folder holds results of another model, other data or other settings, or files that no
                run wrote.
        """
        folder = cls(Path(path))
        with distributed.main_process_first():  # which prepares the folder for the others
            if distributed.is_main():
                wanted = plain(json.loads(json.dumps(run_fingerprint, default=str)))
                folder._prepare(wanted, config, overwrite, remedy)
        return folder

    def _prepare(self, wanted: dict[str, Any], config: DictConfig, overwrite: bool, remedy: str) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise RunFolderError(f"output_dir={self.path} is a file: give a folder") from error
        file = self.path / "fingerprint.json"
        strangers = [each.name for each in self.path.iterdir() if not each.name.startswith(".")]
        if strangers and not file.is_file():
            raise RunFolderError(
                f"{self.path} is not empty ({strangers[0]}) and not the folder of a run: give another output_dir="
            )
        with locked(self.path):
            alone = use(self.path)
            if file.is_file() and overwrite:
                if not alone:
                    raise RunFolderError(
                        f"another process works in {self.path}: wait for it before overwrite=true, or give another "
                        "output_dir="
                    )
                self._clear()
            elif file.is_file():
                self._check(_read_record(file), wanted, remedy, bool(config.get("any_version")))
            if alone:  # what killed processes left
                for leftover in [*self.path.glob(f"{TEMPORARY}*"), *self.path.glob(f"*/{TEMPORARY}*")]:
                    shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
            if not file.is_file():
                write_json(file, wanted)
            (self.path / "shards").mkdir(exist_ok=True)
            yaml = OmegaConf.to_yaml(config, resolve=True)
            write_atomic(self.path / "config.yaml", lambda out: out.write(yaml.encode()))
            if (given := overrides_of(config)) is not None:
                listed = OmegaConf.to_yaml(OmegaConf.create([each for each in given if each != "overwrite=true"]))
                write_atomic(self.path / "overrides.yaml", lambda out: out.write(listed.encode()))

    def _check(self, found: Mapping[str, Any], wanted: Mapping[str, Any], remedy: str, any_version: bool) -> None:
        before, now = dict(_flat(found)), dict(_flat(wanted))
        changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        versions = [key for key in changed if "versions" in key.split(".")]
        changed = [key for key in changed if key not in versions or not any_version]
        if changed:
            listed = ", ".join(f"{key} was {before.get(key)!r}, is {now.get(key)!r}" for key in changed[:3])
            more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
            if changed == versions:
                remedy += ", or any_version=true to continue it with other versions"
            raise RunFolderError(f"{self.path} holds another run ({listed}{more}): {remedy}")

    def _clear(self) -> None:
        """Delete what runs write, and nothing else that somebody may have put here."""
        for name in _OWN_FOLDERS:
            shutil.rmtree(self.path / name, ignore_errors=True)
        tables = [file for file in self.path.glob("*.parquet") if file.with_suffix(".csv").is_file()]
        files = [self.path / name for name in (*_OWN_FILES, "fingerprint.json")]
        for file in [*tables, *(table.with_suffix(".csv") for table in tables), *files]:
            file.unlink(missing_ok=True)

    def has_shard(self, index: int) -> bool:
        """Whether batch `index` is finished. One that has lost a file is deleted, to be made again."""
        shard = self._shard(index)
        if not shard.is_dir():
            return False
        record = shard / "shard.json"
        if record.is_file() and all((shard / name).is_file() for name in _read_record(record).get("files", ())):
            return True
        shutil.rmtree(shard)
        return False

    def write_shard(
        self, index: int, tables: Mapping[str, pd.DataFrame | dict[str, torch.Tensor]], num_samples: int, seconds: float
    ) -> None:
        """Store one finished batch of samples; it exists completely or not at all.

        Tables are joined in the order of the batches, each of which may leave some out. A dict of tensors, samples
        first, is kept beside them as safetensors (see `tensors`).
        """
        self.write_files(index, serialised(tables), num_samples, seconds)

    def write_files(
        self, index: int, files: Mapping[str, bytes], num_samples: int, seconds: float, failures: Sequence[Any] = ()
    ) -> None:
        """Like `write_shard`, of tables that are `serialised` already; failures are one JSON object a sample."""
        final = self._shard(index)
        temporary = temporary_name(final)
        temporary.mkdir()
        for name, data in files.items():
            write_atomic(temporary / name, lambda out, data=data: out.write(data))  # type: ignore[misc]
        record = {"num_samples": num_samples, "failures": list(failures), "seconds": seconds, "files": sorted(files)}
        write_json(temporary / "shard.json", record)
        try:
            temporary.rename(final)
        except OSError:
            if not final.is_dir():
                raise
            shutil.rmtree(temporary)  # another process was first with the same batch

    def _shard(self, index: int) -> Path:
        return self.path / "shards" / f"{index:08d}"

    def _shards(self) -> list[Path]:
        return sorted(each for each in (self.path / "shards").iterdir() if not each.name.startswith(TEMPORARY))

    def _shard_records(self) -> list[dict[str, Any]]:
        return [_read_record(shard / "shard.json") for shard in self._shards()]

    def merge(self) -> None:
        """Join the shards: every table as Parquet and CSV, and `failures.jsonl`.

        The bytes depend on the shards alone, so an interrupted run ends like an uninterrupted one.
        """
        lines = [json.dumps(failure) + "\n" for record in self._shard_records() for failure in record["failures"]]
        write_atomic(self.path / "failures.jsonl", lambda out: out.write("".join(lines).encode()))
        for name in sorted({file.stem for shard in self._shards() for file in shard.glob("*.parquet")}):
            files = [shard / f"{name}.parquet" for shard in self._shards()]
            self._write_table(name, [file for file in files if file.is_file()])

    def _write_table(self, name: str, files: Sequence[Path]) -> None:
        # A column that is empty in one shard has no type there; the others' type holds.
        schemas = [pq.read_schema(file).remove_metadata() for file in files]
        schema = pa.unify_schemas(schemas, promote_options="permissive")

        def row_groups() -> Iterator[pa.Table]:
            waiting = [schema.empty_table()]
            for file in files:
                waiting.append(pq.read_table(file).replace_schema_metadata(None))
                if sum(map(len, waiting)) >= ROWS_PER_GROUP:
                    yield pa.concat_tables(waiting, promote_options="permissive")
                    waiting = [schema.empty_table()]
            yield pa.concat_tables(waiting, promote_options="permissive")

        def write_parquet(out: BinaryIO) -> None:
            with pq.ParquetWriter(out, schema, compression="zstd") as writer:
                for table in row_groups():
                    writer.write_table(table, row_group_size=ROWS_PER_GROUP)

        def write_csv(out: BinaryIO) -> None:
            with pyarrow.csv.CSVWriter(out, schema) as writer:
                for table in row_groups():
                    writer.write_table(table)

        write_atomic(self.path / f"{name}.parquet", write_parquet)
        write_atomic(self.path / f"{name}.csv", write_csv)

    def write_table(self, name: str, frame: pd.DataFrame) -> None:
        """Write a table that was computed from the others, as Parquet and CSV."""
        table = pa.Table.from_pandas(frame, preserve_index=False).replace_schema_metadata(None)
        write_atomic(self.path / f"{name}.parquet", lambda out: pq.write_table(table, out, compression="zstd"))
        write_atomic(self.path / f"{name}.csv", lambda out: pyarrow.csv.write_csv(table, out))

    def read_table(self, name: str) -> pd.DataFrame:
        """A table of this run; a `RunFolderError` where there is none of this name (yet)."""
        file = self.path / f"{name}.parquet"
        if not file.is_file():
            raise RunFolderError(f"{self.path} has no table {name!r}: the run is not finished")
        return pd.read_parquet(file)

    def tensors(self, name: str, key: str) -> Iterator[torch.Tensor]:
        """The tensor `key` that each shard keeps under `name`, in order; nothing else is read from disk."""
        for shard in self._shards():
            if (shard / f"{name}.safetensors").is_file():
                with safe_open(shard / f"{name}.safetensors", framework="pt") as file:
                    yield file.get_tensor(key)

    @property
    def seconds(self) -> float:
        """Work on the finished batches, over every session that the run took."""
        return float(sum(record["seconds"] for record in self._shard_records()))

    def failures(self) -> list[dict[str, Any]]:
        """The samples that could not be used, in order."""
        return [failure for record in self._shard_records() for failure in record["failures"]]

    def write_summary(self, *, model: str, data: str, num_layers: int, **content: Any) -> dict[str, Any]:
        """Write `summary.json`: the keys that every command shares, then `content`. Returns what was written."""
        records = self._shard_records()
        summary = plain(
            {
                "model": model,
                "data": data,
                "num_samples": sum(record["num_samples"] for record in records),
                "num_failed": sum(len(record["failures"]) for record in records),
                "num_layers": num_layers,
                "seconds": round(self.seconds, 3),
                "versions": versions(),
                **content,
            }
        )
        write_json(self.path / "summary.json", summary)
        return summary

    def save_figure(self, name: str, figure: Figure) -> Path:
        """Write `figures/<name>.png` and `.pdf`, the same bytes for the same figure, and close it. Returns the PNG."""
        from matplotlib import pyplot as plt  # slow to import, and most users of run folders draw nothing

        folder = self.path / "figures"
        folder.mkdir(exist_ok=True)
        figure.draw_without_rendering()
        figure.set_layout_engine(None)  # the layout is found; with an engine, each format would draw twice
        for suffix, metadata in (("pdf", {"CreationDate": None}), ("png", {"Software": None})):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=suffix, metadata=metadata)
            write_atomic(folder / f"{name}.{suffix}", lambda out, buffer=buffer: out.write(buffer.getvalue()))  # type: ignore[misc]
        plt.close(figure)  # pyplot keeps what it opened, and a multirun draws hundreds
        return folder / f"{name}.png"
