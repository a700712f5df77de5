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

import pandas as pd

from dyvte.data.metrics import exact_match
from dyvte.data.shapes import ShapesDataset
from dyvte.mllm import load
from dyvte.policies.fixed_exit import FixedExit

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


def main() -> None:
    """Run lmms-eval in a process of its own and compare its score with ours."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pretrained", default="llava_shapes")
    pretrained = parser.parse_args().pretrained
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = write_task(folder)
        log = folder / "log.jsonl"
        model_args = f"pretrained={pretrained},policy=fixed_exit,layer={LAYER},log_file={log}"
        command = [sys.executable, "-m", "lmms_eval", "--model", "dyvte", "--model_args", model_args]
        command += ["--tasks", "shapes_small", "--include_path", name, "--batch_size", "8", "--device", "cpu"]
        subprocess.run([*command, "--output_path", str(folder / "out")], check=True)
        (file,) = (folder / "out").rglob("*results.json")
        scores = json.loads(file.read_text())["results"]["shapes_small"]
        (score,) = [value for key, value in scores.items() if key.startswith("exact_match,")]
        notes = [json.loads(line) for line in log.read_text().splitlines()]
    mllm = load(pretrained)
    samples = list(data)
    batch = mllm.encode([each.image for each in samples], [each.question for each in samples])
    with FixedExit(LAYER)(mllm):
        answers = mllm.decode(mllm.generate_ids(batch, max_new_tokens=16))
    own = sum(exact_match(answer, each.answer) for answer, each in zip(answers, samples, strict=True)) / len(samples)
    assert abs(score - own) < 1e-6, f"lmms-eval scores {score}, dyvte {own}"
    assert len(notes) == QUESTIONS
    assert {note["exit_layer"] for note in notes} <= {0, LAYER}
    assert all(note["prefill_flops"] > 0 and note["seconds"] > 0 for note in notes)
    print(f"lmms-eval: exact match {score:.3f}, the same as dyvte's own; {len(notes)} questions logged")


if __name__ == "__main__":
    main()
