"""One pass over a data set in batches that can be killed at any moment and continued."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import pandas as pd
import torch
from tqdm import tqdm

from dyvte.data.base import Dataset, Sample
from dyvte.errors import BrokenSample, ConfigError, DataError
from dyvte.runs import distributed
from dyvte.runs.store import RunFolder

Compute = Callable[[list[Sample]], Mapping[str, pd.DataFrame | dict[str, torch.Tensor]]]


def consecutive_batches(num_samples: int, batch_size: int) -> list[range]:
    """Sample indices of each batch, in the order of the data.

    Raises:
        ConfigError: `batch_size` is not a positive number.
    """
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

    Samples that cannot be read are recorded in `failures.jsonl` and left out of their batch. Several processes
    (`accelerate launch`, `torchrun`) take turns at the batches; the shards and what is joined from them stay the same.

    Args:
        folder: where the results go; its finished batches are not computed again.
        dataset: the samples.
        batches: sample indices of each batch, the same at every start (see `consecutive_batches`).
        compute: turns the readable samples of a batch into named tables (or tensors, see `RunFolder.write_shard`). It
            raises `BrokenSample` for nothing: a sample that reaches it counts as used.
        description: label of the progress bar.

    Raises:
        DataError: no sample of the whole run could be used.
        ConfigError: a batch does not fit into memory.
    """
    mine = range(distributed.rank(), len(batches), distributed.world_size())
    todo = [index for index in mine if not folder.has_shard(index)]
    total = sum(len(batches[index]) for index in mine)
    done = total - sum(len(batches[index]) for index in todo)
    quiet = not distributed.is_main()
    with tqdm(
        total=total, initial=done, desc=description, unit="sample", dynamic_ncols=True, disable=quiet
    ) as progress:
        for index in todo:
            start = time.perf_counter()
            samples, failures = _read(dataset, batches[index])
            try:
                tables = compute(samples) if samples else {}
            except torch.OutOfMemoryError as error:
                raise ConfigError(
                    f"out of memory on a batch of {len(samples)}: set batch_size= to a smaller number (with "
                    "overwrite=true, batches of different sizes are not mixed)"
                ) from error
            folder.write_shard(index, tables, failures, len(samples), time.perf_counter() - start)
            progress.update(len(batches[index]))
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


def _read(dataset: Dataset, indices: Sequence[int]) -> tuple[list[Sample], list[dict[str, object]]]:
    samples, failures = [], []
    for index in indices:
        try:
            samples.append(dataset[index])
        except BrokenSample as broken:
            failures.append({"index": index, "where": broken.where, "why": broken.why})
    return samples, failures
