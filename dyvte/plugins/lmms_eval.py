"""dyvte as a model of lmms-eval: any of its tasks under any policy.

    lmms-eval eval --model dyvte --model_args pretrained=llava_shapes,policy=fixed_exit,layer=8 --tasks ...

Found through the entry-point group `lmms_eval.models`; `pip install .[lmms-eval]` installs what it needs.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.models.registry_v2 import ModelManifest
from tqdm import tqdm

from dyvte.batch import Batch
from dyvte.calibrate import build_policy
from dyvte.cost.flops import prefill_flops
from dyvte.loading import load
from dyvte.mllm import MLLM
from dyvte.plugins.chat_media import read_chat
from dyvte.policies.base import Policy
from dyvte.runs import distributed
from dyvte.runs.config import compose


def manifest() -> ModelManifest:
    """What the entry point hands to lmms-eval."""
    return ModelManifest(model_id="dyvte", chat_class_path=f"{__name__}.Dyvte")


class Dyvte(lmms):
    """A multimodal LLM under a policy, as a chat model: text and images in any order, several turns in one prompt.

    Videos go to families whose processor reads them, as frames spread evenly over their length. Beside the answers it
    logs the mean exit layer, FLOPs of the prefill and seconds a question; with `log_file` also those of every question,
    one JSON object a line.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str = "llava_shapes",
        policy: str = "none",
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str | None = None,
        attn_implementation: str | None = None,
        max_new_tokens: int = 64,
        max_num_frames: int = 32,
        log_file: str | None = None,
        **settings: Any,
    ) -> None:
        """Load the model and make the policy.

        Args:
            pretrained: what `dyvte.load` takes: the name of a shipped model, a folder or a Hub id.
            policy: a file of `conf/policy/`.
            batch_size: questions answered at once.
            device: by default cuda where there is one; each of several processes takes its own.
            dtype, attn_implementation: as for `dyvte.load`.
            max_new_tokens: where the task does not say.
            max_num_frames: of a video.
            log_file: where each question's exit layer, FLOPs and time go; with several processes one file each.
            **settings: of the policy: `layer=8`, `gates=...`, `keep=0.5`.
        """
        super().__init__()
        self._rank, self._world_size = distributed.rank(), distributed.world_size()
        if device in (None, "cuda") or self._world_size > 1:
            device = str(PartialState().device)
        options = {"dtype": dtype, "attn_implementation": attn_implementation}
        given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
        self.mllm: MLLM = load(pretrained, device=device, **given)
        overrides = [f"policy={policy}", *(f"policy.{name}={value}" for name, value in settings.items())]
        self.policy: Policy = build_policy(compose("evaluate", overrides).policy)
        self.policy.check(self.mllm)
        self.batch_size = int(batch_size)
        self.max_new_tokens, self.max_num_frames = int(max_new_tokens), int(max_num_frames)
        self.log_file = None if log_file is None else Path(log_file)
        if self.log_file is not None and self._world_size > 1:
            self.log_file = self.log_file.with_suffix(f".{self._rank}{self.log_file.suffix}")

    @property
    def model(self) -> Any:
        """The transformers model."""
        return self.mllm.model

    @property
    def device(self) -> torch.device:
        """Where the model runs; lmms-eval's processes exchange their counts there."""
        return self.mllm.device

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answer; requests with the same generation settings share a batch."""
        results: list[GenerationResult | None] = [None] * len(requests)
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[2], sort_keys=True, default=str), []).append(index)
        notes: list[dict[str, Any]] = []
        with tqdm(total=len(requests), desc=f"dyvte {self._rank}", disable=self._rank != 0) as progress:
            for indices in groups.values():
                # Prompts of like length need little padding.
                indices.sort(key=lambda index: len(requests[index].args[0]))
                for start in range(0, len(indices), self.batch_size):
                    chosen = indices[start : start + self.batch_size]
                    answers = self._answer([requests[index] for index in chosen], notes)
                    for index, answer in zip(chosen, answers, strict=True):
                        results[index] = answer
                    progress.update(len(chosen))
        self._log(notes)
        return [each for each in results if each is not None]

    def _answer(self, requests: Sequence[Instance], notes: list[dict[str, Any]]) -> list[GenerationResult]:
        chats = []
        for request in requests:
            _, doc_to_messages, _, doc_id, task, split = request.args
            messages = doc_to_messages(self.task_dict[task][split][doc_id])
            chats.append(read_chat(messages, f"task {task}, document {doc_id}", self.max_num_frames))
        batch = self.mllm.encode_chats(chats)
        settings, stops = self._generation(requests[0].args[2])
        started = time.perf_counter()
        with self.policy(self.mllm) as run:
            ids = self.mllm.generate_ids(batch, **settings)
            exits = run.exit_layers
        exits = exits[:: len(exits) // len(requests)]  # one a beam
        seconds = (time.perf_counter() - started) / len(requests)
        flops = self._flops(batch)
        answers = [_cut(text, stops) for text in self.mllm.decode(ids)]
        for request, tokens, exit_layer in zip(requests, ids, exits.tolist(), strict=True):
            note = {"task": request.args[4], "doc_id": request.args[3], "exit_layer": exit_layer, "seconds": seconds}
            notes.append({**note, "prefill_flops": flops, "new_tokens": len(tokens)})
        for request, text in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("generate_until", (request.args[0], request.args[2]), text)
        return [
            GenerationResult(text=text, token_counts=TokenCounts(output_tokens=len(tokens)))
            for text, tokens in zip(answers, ids, strict=True)
        ]

    def _flops(self, batch: Batch) -> float:
        """Of one question's prefill, the mean of a batch, padding included."""
        with self.policy(self.mllm), torch.no_grad():
            return prefill_flops(self.mllm, batch).total / len(batch["input_ids"])

    def _generation(self, asked: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """A task's generation settings for transformers, and the strings that end an answer."""
        stops = asked.get("until") or []
        temperature = float(asked.get("temperature") or 0.0)
        settings: dict[str, Any] = {
            "max_new_tokens": int(asked.get("max_new_tokens") or self.max_new_tokens),
            "num_beams": int(asked.get("num_beams") or 1),
            "do_sample": temperature > 0,
        }
        if temperature > 0:
            settings |= {"temperature": temperature, "top_p": asked.get("top_p")}
        return settings, [stops] if isinstance(stops, str) else list(stops)

    def _log(self, notes: list[dict[str, Any]]) -> None:
        seconds = sum(note["seconds"] for note in notes)
        tokens = sum(note["new_tokens"] for note in notes)
        count = max(len(notes), 1)
        log_metrics(
            total_gen_tokens=tokens,
            total_elapsed_time=seconds,
            avg_speed=tokens / seconds if seconds else 0.0,
            additional_metrics={
                "mean_exit_layer": sum(note["exit_layer"] for note in notes) / count,
                "mean_prefill_flops": sum(note["prefill_flops"] for note in notes) / count,
                "seconds_per_question": seconds / count,
            },
        )
        if self.log_file is not None:
            self.log_file.parent.mkdir(parents=True, exist_ok=True)
            with self.log_file.open("a") as file:
                file.writelines(json.dumps(note) + "\n" for note in notes)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Not available: policies are about answering."""
        raise NotImplementedError("dyvte generates answers; choose a generate_until task")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not available: one prompt, one answer."""
        raise NotImplementedError("dyvte answers one prompt at a time; choose a generate_until task")


def _cut(text: str, stops: Sequence[str]) -> str:
    """An answer up to the first of the strings that end it."""
    for stop in stops:
        text = text.split(stop)[0] if stop else text
    return text.strip()
