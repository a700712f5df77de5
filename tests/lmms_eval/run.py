"""`make test-lmms-eval`: lmms-eval itself runs the shipped model, and its answers are compared with dyvte's own.

Three methods answer four tasks in batches: an image, several turns, two images with text between, a broken image. Every
other method of `conf/policy/` answers two questions in several turns, and two processes share a run from the command
line. dyvte's own answers are those to one question at a time. Not collected by pytest: lmms-eval brings packages along
that nothing else here needs; `tests/test_lmms_eval.py` tests the plug-in without it.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager

sys.path.insert(0, str(Path(__file__).parent))
import conversations

from dyvte.calibrate import calibrated_policy
from dyvte.data.metrics import exact_match
from dyvte.data.shapes import ShapesDataset
from dyvte.loading import load
from dyvte.mllm import MLLM
from dyvte.plugins.chat_media import read_chat
from dyvte.runs.config import compose

HERE = Path(__file__).parent
QUESTIONS, FEW, BATCH, NEW_TOKENS = 8, 2, 4, 16
TASKS = ("one_image", "two_turns", "two_images", "one_broken")
THREE = {"fixed_exit": ("layer=6",), "fastv": ("keep=0.5",), "fastervlm": ("keep=0.5",)}
NEEDED = {
    **THREE,
    "skip_attention": ("layers=[4,5]",),
    "vtw": ("calibration.data.limit=4",),
    "fitprune": ("calibration.data.limit=4",),
}
"""Settings that a method does not have by default, or not quickly."""


def write_tasks(folder: Path) -> list[dict[str, Any]]:
    """The tasks' files, with questions of the built-in data, which are returned."""
    rows: list[dict[str, Any]] = []
    for sample in ShapesDataset(limit=QUESTIONS):
        picture = io.BytesIO()
        sample.image.save(picture, "PNG")
        row = {"number": len(rows), "question": sample.question, "answer": sample.answer}
        rows.append({**row, "image": picture.getvalue()})
    for row, other in zip(rows, reversed(rows), strict=True):
        row["other"] = other["image"]
    pd.DataFrame(rows).to_parquet(folder / "questions.parquet")
    for name in TASKS:
        task = (HERE / "task.yaml").read_text().replace("NAME", name).replace("DATA", str(folder / "questions.parquet"))
        (folder / f"{name}.yaml").write_text(task)
    (folder / "conversations.py").write_text((HERE / "conversations.py").read_text())
    return rows


def own_answers(mllm: MLLM, policy: str, task: str, rows: list[dict[str, Any]], folder: Path) -> list[str]:
    """dyvte's answers to a task's questions, one at a time; an empty one to what cannot be read."""
    settings = [each if "." in each.partition("=")[0] else f"policy.{each}" for each in NEEDED.get(policy, ())]
    running = calibrated_policy(mllm, compose("evaluate", [f"policy={policy}", *settings]), folder)
    found = []
    for row in rows:
        if task == "one_broken" and row["number"] == 0:
            found.append("")
            continue
        batch = mllm.encode_chats([read_chat(getattr(conversations, task)(row), task, 1)])
        with running(mllm):
            found.append(str(mllm.generate(batch, max_new_tokens=NEW_TOKENS)[0]).strip())
    return found


def model_args(pretrained: str, policy: str, log: Path) -> str:
    """What stands behind `--model_args`."""
    return ",".join([f"pretrained={pretrained}", f"policy={policy}", *NEEDED.get(policy, ()), f"log_file={log}"])


def read_logs(*logs: Path) -> list[dict[str, Any]]:
    """What the plug-in wrote of every request."""
    return [json.loads(line) for log in logs for line in log.read_text().splitlines()]


def compare(mllm: MLLM, folder: Path, rows: list[dict[str, Any]], pretrained: str, policy: str) -> None:
    """Let lmms-eval run a method and compare every answer with our own.

    Raises:
        AssertionError: an answer is another, or a request is missing in the log.
    """
    tasks, limit = (TASKS, QUESTIONS) if policy in THREE else (("two_turns",), FEW)
    own_folder, log = folder / policy, folder / policy / "lmms_eval" / "log.jsonl"
    log.parent.mkdir(parents=True)
    results = simple_evaluate(
        model="dyvte",
        model_args=model_args(pretrained, policy, log),
        tasks=list(tasks),
        batch_size=BATCH,
        device="cpu",
        limit=limit,
        task_manager=TaskManager(include_path=str(folder), model_name="dyvte"),
    )
    notes = read_logs(log)
    for task in tasks:
        samples = sorted(results["samples"][task], key=lambda each: each["doc_id"])
        found = [each["filtered_resps"][0] for each in samples]
        own = own_answers(mllm, policy, task, rows[:limit], own_folder)
        assert found == own, f"{policy}, {task}: lmms-eval has {found}, dyvte {own}"
        of_task = [note for note in notes if note["task"] == task]
        assert sorted(note["doc_id"] for note in of_task) == list(range(limit))
        broken = [note["doc_id"] for note in of_task if "error" in note]
        assert broken == [0] * (task == "one_broken"), f"{policy}, {task}: could not answer {broken}"
    answered = [note for note in notes if "error" not in note]
    assert all(note["prefill_flops"] > 0 and note["seconds"] > 0 for note in answered)
    if policy == "fixed_exit":
        assert {note["exit_layer"] for note in answered} <= {0, 6}
    print(f"lmms-eval, {policy}: {len(notes)} requests of {', '.join(tasks)}, answered as by dyvte itself", flush=True)


def compare_processes(mllm: MLLM, folder: Path, rows: list[dict[str, Any]], pretrained: str, processes: int) -> None:
    """The command line in several processes: they share the questions, and the score is that of our own answers.

    Raises:
        AssertionError: it is another.
    """
    policy, task, log = "fixed_exit", "two_turns", folder / "shared.jsonl"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), "-m", "lmms_eval"]
    command += ["--model", "dyvte", "--model_args", model_args(pretrained, policy, log)]
    command += ["--tasks", task, "--include_path", str(folder), "--batch_size", str(BATCH), "--device", "cpu"]
    subprocess.run([*command, "--output_path", str(folder / "shared")], check=True)
    (file,) = (folder / "shared").rglob("*results.json")
    scores = json.loads(file.read_text())["results"][task]
    (score,) = (value for key, value in scores.items() if key.startswith("exact_match,"))
    own = own_answers(mllm, policy, task, rows, folder)
    right = [exact_match(text, row["answer"]) for text, row in zip(own, rows, strict=True)]
    assert abs(score - sum(right) / len(rows)) < 1e-6, f"{score}, dyvte {sum(right) / len(rows)}"
    notes = read_logs(*(log.with_suffix(f".{rank}.jsonl") for rank in range(processes)))
    assert sorted(note["doc_id"] for note in notes) == list(range(QUESTIONS))
    print(f"lmms-eval, {policy}, {processes} processes: score {score:.3f}, as of dyvte's own answers", flush=True)


def main() -> None:
    """Compare what was asked for, by default everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pretrained", default="llava_shapes")
    every = sorted(file.stem for file in (HERE.parents[1] / "conf" / "policy").glob("*.yaml"))
    parser.add_argument("--policies", nargs="*", default=[*THREE, *(name for name in every if name not in THREE)])
    parser.add_argument("--processes", type=int, default=2, help="1: leave this part out")
    given = parser.parse_args()
    mllm = load(given.pretrained, device="cpu")
    with tempfile.TemporaryDirectory() as name:
        rows = write_tasks(Path(name))
        for policy in given.policies:
            compare(mllm, Path(name), rows, given.pretrained, policy)
        if given.processes > 1:
            compare_processes(mllm, Path(name), rows, given.pretrained, given.processes)
    print(f"passed with lmms-eval {version('lmms-eval')}, {len(given.policies)} methods")


if __name__ == "__main__":
    main()
