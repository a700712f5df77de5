"""`make test-lmms-eval`: lmms-eval itself runs the shipped model under a policy over a few questions.

Not collected by pytest: lmms-eval brings packages along that nothing else here needs.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd

from dyvte.data.metrics import exact_match
from dyvte.data.shapes import ShapesDataset
from dyvte.loading import load
from dyvte.policies.exits.fixed_exit import FixedExit

HERE = Path(__file__).parent
QUESTIONS, LAYER = 24, 6


def write_task(folder: Path) -> ShapesDataset:
    """The task's files, with questions of the built-in data."""
    data = ShapesDataset(limit=QUESTIONS)
    rows = []
    for sample in data:
        picture = io.BytesIO()
        sample.image.save(picture, "PNG")
        rows.append({"question": sample.question, "answer": sample.answer, "image": picture.getvalue()})
    pd.DataFrame(rows).to_parquet(folder / "questions.parquet")
    task = (HERE / "shapes_small.yaml").read_text().replace("DATA", str(folder / "questions.parquet"))
    (folder / "shapes_small.yaml").write_text(task)
    (folder / "shapes_task.py").write_text((HERE / "shapes_task.py").read_text())
    return data


def run_lmms_eval(folder: Path, pretrained: str, processes: int) -> tuple[float, list[dict[str, Any]]]:
    """Score and log of lmms-eval, in one or several processes of its own."""
    out, log = folder / f"out{processes}", folder / f"log{processes}.jsonl"
    model_args = f"pretrained={pretrained},policy=fixed_exit,layer={LAYER},log_file={log}"
    start = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)] if processes > 1 else []
    command = [sys.executable, *start, "-m", "lmms_eval", "--model", "dyvte", "--model_args", model_args]
    command += ["--tasks", "shapes_small", "--include_path", str(folder), "--batch_size", "8", "--device", "cpu"]
    subprocess.run([*command, "--output_path", str(out)], check=True)
    (file,) = out.rglob("*results.json")
    scores = json.loads(file.read_text())["results"]["shapes_small"]
    (score,) = [value for key, value in scores.items() if key.startswith("exact_match,")]
    logs = [log] if processes == 1 else [log.with_suffix(f".{rank}.jsonl") for rank in range(processes)]
    return score, [json.loads(line) for each in logs for line in each.read_text().splitlines()]


def main() -> None:
    """Run lmms-eval in one process and in two, and compare its scores with ours."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pretrained", default="llava_shapes")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    given = parser.parse_args()
    mllm = load(given.pretrained)
    with tempfile.TemporaryDirectory() as name:
        samples = list(write_task(Path(name)))
        batch = mllm.encode([each.image for each in samples], [each.question for each in samples])
        with FixedExit(LAYER)(mllm):
            answers = mllm.decode(mllm.generate_ids(batch, max_new_tokens=16))
        own = sum(exact_match(text, each.answer) for text, each in zip(answers, samples, strict=True)) / len(samples)
        for processes in given.processes:
            score, notes = run_lmms_eval(Path(name), given.pretrained, processes)
            assert abs(score - own) < 1e-6, f"lmms-eval scores {score} with {processes} processes, dyvte {own}"
            assert sorted(note["doc_id"] for note in notes) == list(range(QUESTIONS))
            assert {note["exit_layer"] for note in notes} <= {0, LAYER}
            assert all(note["prefill_flops"] > 0 and note["seconds"] > 0 for note in notes)
            print(f"lmms-eval, {processes} processes: exact match {score:.3f}, as dyvte's own; {len(notes)} logged")


if __name__ == "__main__":
    main()
