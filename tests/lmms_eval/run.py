"""`make test-lmms-eval`: lmms-eval itself runs the shipped model under three policies over a few questions.

One task shows an image, the other two of them in several turns. Not collected by pytest: lmms-eval brings packages
along that nothing else here needs; `tests/test_lmms_eval.py` tests the plug-in without it.
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

sys.path.insert(0, str(Path(__file__).parent))
from shapes_task import doc_to_messages

from dyvte.calibrate import build_policy
from dyvte.data.metrics import exact_match
from dyvte.data.shapes import ShapesDataset
from dyvte.loading import load
from dyvte.mllm import MLLM
from dyvte.plugins.chat_media import read_chat
from dyvte.runs.config import compose

HERE = Path(__file__).parent
QUESTIONS, NEW_TOKENS = 24, 16
POLICIES = ("fixed_exit,layer=6", "fastv,keep=0.5", "fastervlm,keep=0.5")
TASKS = ("shapes_small", "shapes_pairs")


def write_tasks(folder: Path) -> list[dict[str, Any]]:
    """The tasks' files, with questions of the built-in data, which are returned."""
    rows = []
    for sample in ShapesDataset(limit=QUESTIONS):
        picture = io.BytesIO()
        sample.image.save(picture, "PNG")
        rows.append({"question": sample.question, "answer": sample.answer, "image": picture.getvalue()})
    for row, other in zip(rows, reversed(rows), strict=True):
        row["other"] = other["image"]
    pd.DataFrame(rows).to_parquet(folder / "questions.parquet")
    for name in TASKS:
        task = (HERE / f"{name}.yaml").read_text().replace("DATA", str(folder / "questions.parquet"))
        (folder / f"{name}.yaml").write_text(task)
    (folder / "shapes_task.py").write_text((HERE / "shapes_task.py").read_text())
    return rows


def own_scores(mllm: MLLM, policy: str, rows: list[dict[str, Any]]) -> dict[str, float]:
    """What the tasks' metric makes of dyvte's own answers."""
    name, setting = policy.split(",")
    running = build_policy(compose("evaluate", [f"policy={name}", f"policy.{setting}"]).policy)
    found = {}
    for task in TASKS:
        turns = [doc_to_messages(row)[-1:] if task == "shapes_small" else doc_to_messages(row) for row in rows]
        with running(mllm):
            batch = mllm.encode_chats([read_chat(each, task, 1) for each in turns])
            answers = mllm.decode(mllm.generate_ids(batch, max_new_tokens=NEW_TOKENS))
        right = [exact_match(text, row["answer"]) for text, row in zip(answers, rows, strict=True)]
        found[task] = sum(right) / len(rows)
    return found


def run_lmms_eval(
    folder: Path, pretrained: str, policy: str, processes: int
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Scores by task and log of lmms-eval, in one or several processes of its own."""
    name = f"{policy.partition(',')[0]}{processes}"
    out, log = folder / f"out-{name}", folder / f"log-{name}.jsonl"
    model_args = f"pretrained={pretrained},policy={policy},log_file={log}"
    start = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)] if processes > 1 else []
    command = [sys.executable, *start, "-m", "lmms_eval", "--model", "dyvte", "--model_args", model_args]
    command += ["--tasks", ",".join(TASKS), "--include_path", str(folder), "--batch_size", "8", "--device", "cpu"]
    subprocess.run([*command, "--output_path", str(out)], check=True)
    (file,) = out.rglob("*results.json")
    results = json.loads(file.read_text())["results"]
    scores = {
        task: next(value for key, value in results[task].items() if key.startswith("exact_match,")) for task in TASKS
    }
    logs = [log] if processes == 1 else [log.with_suffix(f".{rank}.jsonl") for rank in range(processes)]
    return scores, [json.loads(line) for each in logs for line in each.read_text().splitlines()]


def main() -> None:
    """Run lmms-eval under every policy, the first one in several processes too, and compare its scores with ours."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pretrained", default="llava_shapes")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    given = parser.parse_args()
    mllm = load(given.pretrained, device="cpu")
    with tempfile.TemporaryDirectory() as name:
        rows = write_tasks(Path(name))
        runs = [(policy, 1) for policy in POLICIES] + [
            (POLICIES[0], number) for number in given.processes if number > 1
        ]
        for policy, processes in runs:
            own = own_scores(mllm, policy, rows)
            scores, notes = run_lmms_eval(Path(name), given.pretrained, policy, processes)
            for task in TASKS:
                assert abs(scores[task] - own[task]) < 1e-6, f"{policy}, {task}: {scores[task]}, dyvte {own[task]}"
                of_task = [note["doc_id"] for note in notes if note["task"] == task]
                assert sorted(of_task) == list(range(QUESTIONS))
            assert all(note["prefill_flops"] > 0 and note["seconds"] > 0 for note in notes)
            if policy.startswith("fixed_exit"):
                assert {note["exit_layer"] for note in notes} <= {0, 6}
            print(f"lmms-eval, {policy}, {processes} processes: {scores}, as dyvte's own; {len(notes)} logged")


if __name__ == "__main__":
    main()
