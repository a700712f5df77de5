"""One pass over a data set in batches that can be killed at any moment and continued."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd
import torch

from dyvte.data.base import Dataset, Sample
from dyvte.errors import BrokenSample, ConfigError, DataError, DyvteError, ModelError, RunFolderError, UnsupportedError
from dyvte.runs import distributed
from dyvte.runs.store import RunFolder, serialised
from dyvte.runs.terminal import progress

NOT_OF_ONE_SAMPLE = (ConfigError, UnsupportedError, RunFolderError, MemoryError, torch.AcceleratorError)
"""Errors of a setting, a model or a device, which every other sample would meet too."""

PATIENCE = 8
"""Samples that may fail, before one works, until the error is taken for one of the program."""

Compute = Callable[[list[Sample]], Mapping[str, pd.DataFrame | dict[str, torch.Tensor]]]


def consecutive_batches(num_samples: int, batch_size: int) -> list[range]:
    """Sample indices of each batch, in the order of the data."""
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}; give a positive number")
    return [range(start, min(start + batch_size, num_samples)) for start in range(0, num_samples, batch_size)]


def run(
    folder: RunFolder,
    dataset: Dataset,
    batches: Sequence[Sequence[int]],
    compute: Compute,
    description: str = "questions",
) -> None:
    """Call `compute` on every batch that `folder` does not hold yet, store its tables, and join them at the end.

    Samples that cannot be read, computed or written are recorded in `failures.jsonl` and left out of their batch: one
    bad sample never ends a run. If nothing works from the start, the error is raised as it is. Several processes
    (`accelerate launch`, `torchrun`) take turns at the batches; the shards and what is joined from them stay the same.

    Args:
        folder: where the results go.
        dataset: the samples.
        batches: sample indices of each batch, the same at every start (see `consecutive_batches`).
        compute: turns the readable samples of a batch into named tables (or tensors, see `RunFolder.write_shard`).
        description: label of the progress bar.
    """
    mine = range(distributed.rank(), len(batches), distributed.world_size())
    todo = [index for index in mine if not folder.has_shard(index)]
    total = sum(len(batches[index]) for index in mine)
    done = total - sum(len(batches[index]) for index in todo)
    quiet = not distributed.is_main()
    with progress(description, "samples", total, initial=done, disable=quiet) as bar:
        works, fruitless = done > 0, 0
        for index in todo:
            start = time.perf_counter()
            read, failures = _read(dataset, batches[index])
            files, used, unusable = _computed(compute, read)
            works = works or bool(used)
            odd = [error for _, error in unusable if not isinstance(error, BrokenSample)]
            fruitless += len(odd)
            if odd and not works and (fruitless >= PATIENCE or index == todo[-1]):
                raise odd[0]  # not one sample's fault
            failures += [_failure(dataset, each, error) for each, error in unusable]
            failures.sort(key=lambda failure: failure["index"])
            folder.write_files(index, files, used, time.perf_counter() - start, failures)
            bar.update(len(batches[index]))
    distributed.barrier()
    with distributed.main_process_first():
        if distributed.is_main():
            folder.merge()
    failed, total = folder.failures(), sum(map(len, batches))
    if len(failed) == total:
        first = f"; the first: {failed[0]['where']}: {failed[0]['why']}" if failed else ""
        raise DataError(
            f"none of the {total} samples could be used{first} "
            f" (all in {folder.path / 'failures.jsonl'}; after repairing the data start again with overwrite=true)"
        )
    if failed and distributed.is_main():
        kept = folder.path / "failures.jsonl"
        print(f"{len(failed)} of {total} samples were left out; {kept} says why", file=sys.stderr)


def _read(dataset: Dataset, indices: Sequence[int]) -> tuple[list[tuple[int, Sample]], list[dict[str, Any]]]:
    samples, failures = [], []
    for index in indices:
        try:
            samples.append((index, dataset[index]))
        except Exception as error:  # BrokenSample, and whatever a reader of rows raises on one of them
            failures.append(_failure(dataset, index, error))
    return samples, failures


def _failure(dataset: Dataset, index: int, error: Exception) -> dict[str, Any]:
    if isinstance(error, BrokenSample):
        return {"index": index, "where": error.where, "why": error.why}
    why = " ".join(str(error).split())
    kind = "" if isinstance(error, DyvteError) and why else f"{type(error).__name__}: "
    return {"index": index, "where": dataset.where(index), "why": f"{kind}{why[:300]}"}


def _computed(
    compute: Compute, read: Sequence[tuple[int, Sample]]
) -> tuple[dict[str, bytes], int, list[tuple[int, Exception]]]:
    """Files of a batch, how many samples they are of, and those that could not be used with the reason."""

    def attempt(samples: Sequence[tuple[int, Sample]]) -> dict[str, bytes]:
        try:
            return serialised(compute([sample for _, sample in samples])) if samples else {}
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"out of memory on a batch of {len(samples)}: set batch_size= to a smaller number (with "
                "overwrite=true, batches of different sizes are not mixed)"
            ) from error

    try:
        return attempt(read), len(read), []
    except NOT_OF_ONE_SAMPLE:
        raise
    except Exception as error:
        if len(read) == 1:
            return {}, 0, [(read[0][0], error)]
    good, unusable = [], []  # each alone says whose fault it is
    for index, sample in read:
        try:
            attempt([(index, sample)])
            good.append((index, sample))
        except NOT_OF_ONE_SAMPLE:
            raise
        except Exception as error:
            unusable.append((index, error))
    if not good and all(
        isinstance(error, ModelError) and "NaN among the logits of row" in str(error) for _, error in unusable
    ):
        raise unusable[0][1]  # the weights are broken, not the samples
    if not unusable:  # each works alone: an error of the batch, raised as it is
        attempt(read)
    return attempt(good), len(good), unusable
