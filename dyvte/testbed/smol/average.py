"""The mean of two trained parts: `python -m dyvte.testbed.smol.average FIRST SECOND OUT --weight 0.5`.

Two runs that start from the same parts lie in one basin of the loss, and the mean of their weights is often better than
either (Wortsman et al. 2022, arXiv 2203.05482, section 3).
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from dyvte.errors import ModelError

WEIGHTS = ("projector.safetensors", "adapter/adapter_model.safetensors")


def average_parts(first: Path, second: Path, out: Path, weight: float = 0.5) -> None:
    """Write parts whose every tensor is `(1 - weight) * first + weight * second`, of two runs of one shape.

    The low-rank factors are averaged, not their product: a convention, which keeps the rank. Everything but the tensors
    is the first's; its record gets a line.

    Example:
        >>> average_parts(Path("a"), Path("b"), Path("mean"), weight=0.5)  # doctest: +SKIP
    """
    if not 0 <= weight <= 1:
        raise ModelError(f"weight must lie between 0 and 1, got {weight}")
    if out.exists():
        raise ModelError(f"{out} exists; choose a folder that does not")
    means = {}
    for name in WEIGHTS:
        if not ((first / name).is_file() or (second / name).is_file()):
            continue  # neither has an adapter: the projector alone was trained
        a, b = (load_file(folder / name) if (folder / name).is_file() else {} for folder in (first, second))
        if differing := sorted(k for k in a.keys() | b.keys() if k not in a or k not in b or a[k].shape != b[k].shape):
            raise ModelError(f"{first / name} and {second / name} differ in {differing[0]}; average runs of one shape")
        means[name] = {k: ((1 - weight) * a[k].float() + weight * b[k].float()).to(a[k].dtype).contiguous() for k in a}
    shutil.copytree(first, out)
    for name, tensors in means.items():
        save_file(tensors, out / name)
    record = json.loads((out / "training.json").read_text())
    record["averaged"] = {"first": str(first), "second": str(second), "weight": weight}
    (out / "training.json").write_text(json.dumps(record, indent=1))


def main() -> None:
    """Average the two folders of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--weight", type=float, default=0.5, help="share of the second")
    options = parser.parse_args()
    try:
        average_parts(options.first, options.second, options.out, options.weight)
    except ModelError as error:
        raise SystemExit(f"error: {error}") from None
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
