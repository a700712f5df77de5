"""dyvte as a model of lmms-eval: any of its tasks under any policy.

    lmms-eval eval --model dyvte --model_args pretrained=llava_shapes,policy=fixed_exit,layer=8 --tasks ...

Found through the entry-point group `lmms_eval.models`; `pip install .[lmms-eval]` installs what it needs.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from hydra.errors import HydraException
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.models.registry_v2 import ModelManifest
from loguru import logger as eval_logger
from tqdm import tqdm

from dyvte.batch import Batch
from dyvte.calibrate import calibrated_policy
from dyvte.cost.flops import prefill_flops
from dyvte.errors import BrokenSample, ConfigError, DyvteError
from dyvte.loading import load
from dyvte.mllm import MLLM
from dyvte.plugins.chat_media import read_chat
from dyvte.policies.base import Policy
from dyvte.runs import distributed
from dyvte.runs.config import compose

GIVE_UP_AFTER = 20
"""Requests that nothing answers, from the first on, end the run: so often it is no matter of a single one."""


def manifest() -> ModelManifest:
    """What the entry point hands to lmms-eval."""
    return ModelManifest(model_id="dyvte", chat_class_path=f"{__name__}.Dyvte")


class Dyvte(lmms):
    """A multimodal LLM under a policy, as a chat model: text and images in any order, several turns in one prompt.

    Videos go to families whose processor reads them, as frames spread evenly over their length. Beside the answers it
    logs the mean exit layer, FLOPs of the prefill and seconds a question; with `log_file` also those of every question,
    one JSON object a line.

    A request that cannot be answered (a broken image, a video for a model that takes none) is warned of and named in
    the log, and its answer is empty; the run goes on unless it starts with `GIVE_UP_AFTER` of them or has no others.
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
        count_flops: bool = True,
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
            count_flops: whether to count FLOPs, which runs every prefill once more.
            log_file: where each question's exit layer, FLOPs and time go; with several processes one file each.
            **settings: of the policy: `layer=8`, `gates=...`, `keep=0.5`. A name with a dot is a key of
                `conf/evaluate.yaml`: `policy=vtw,data@calibration.data=llava_json,calibration.data.file=...`.

        Raises:
            DyvteError: an unknown policy or setting, or a model that cannot be loaded or does not suit the policy.
        """
        super().__init__()
        self._rank, self._world_size = distributed.rank(), distributed.world_size()
        if device in (None, "cuda") or self._world_size > 1:
            device = str(PartialState().device)
        options = {"dtype": dtype, "attn_implementation": attn_implementation}
        given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
        self.mllm: MLLM = load(pretrained, device=device, **given)
        self.log_file = None if log_file is None else Path(log_file)
        self.policy = self._policy(policy, settings)
        self.policy.check(self.mllm)
        self.batch_size, self.count_flops = int(batch_size), bool(count_flops)
        self.max_new_tokens, self.max_num_frames = int(max_new_tokens), int(max_num_frames)
        if self.log_file is not None and self._world_size > 1:
            self.log_file = self.log_file.with_suffix(f".{self._rank}{self.log_file.suffix}")

    def _policy(self, name: str, settings: dict[str, Any]) -> Policy:
        """The policy of a file of `conf/policy/`; what it calibrates is kept beside the log."""
        keys = {key if "." in key else f"policy.{key}": value for key, value in settings.items()}
        try:
            cfg = compose("evaluate", [f"policy={name}", *(f"{key}={value}" for key, value in keys.items())])
        except HydraException as error:
            raise ConfigError(" ".join(str(error).split())) from error
        if self.log_file is None:
            with tempfile.TemporaryDirectory() as folder:
                return calibrated_policy(self.mllm, cfg, Path(folder))
        self.log_file.parent.mkdir(parents=True, exist_ok=True)
        return calibrated_policy(self.mllm, cfg, self.log_file.parent)

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
        results: dict[int, GenerationResult] = {}
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
                    results.update(zip(chosen, answers, strict=True))
                    progress.update(len(chosen))
                    if len(notes) >= GIVE_UP_AFTER:
                        _check_answered(notes)
        self._log(notes)
        _check_answered(notes)
        return [results[index] for index in range(len(requests))]

    def _answer(self, requests: Sequence[Instance], notes: list[dict[str, Any]]) -> list[GenerationResult]:
        """Answer a batch; where that fails, each request on its own, so that the one to blame is alone without one."""
        try:
            return self._answer_batch(requests, notes)
        except DyvteError as error:
            if len(requests) > 1:
                return [answer for each in requests for answer in self._answer([each], notes)]
            reason = str(error)
        where = _where(requests[0])
        named = reason if where in reason else f"{where}: {reason}"
        eval_logger.warning(f"{named}; its answer is left empty")  # lmms-eval shows no `warnings`
        notes.append({"task": requests[0].args[4], "doc_id": requests[0].args[3], "error": named})
        return [GenerationResult(text="", token_counts=TokenCounts(output_tokens=0))]

    def _answer_batch(self, requests: Sequence[Instance], notes: list[dict[str, Any]]) -> list[GenerationResult]:
        batch = self._encode(requests)
        settings, stops = self._generation(requests[0].args[2])
        started = time.perf_counter()
        with self.policy(self.mllm) as run:
            ids = self.mllm.generate_ids(batch, **settings)
            exits = run.exit_layers
        exits = exits[:: len(exits) // len(requests)]  # one a beam
        seconds = (time.perf_counter() - started) / len(requests)
        flops = self._flops(batch) if self.count_flops else None
        answers = [_cut(text, stops) for text in self.mllm.decode(ids)]
        results = []
        rows = zip(requests, answers, ids, batch["attention_mask"].sum(1).tolist(), exits.tolist(), strict=True)
        for request, text, tokens, prompt, exit_layer in rows:
            note = {"task": request.args[4], "doc_id": request.args[3], "exit_layer": exit_layer, "seconds": seconds}
            notes.append({**note, "prefill_flops": flops, "new_tokens": len(tokens)})
            self.cache_hook.add_partial("generate_until", (request.args[0], request.args[2]), text)
            counts = TokenCounts(input_tokens=prompt, output_tokens=len(tokens))
            results.append(GenerationResult(text=text, token_counts=counts))
        return results

    def _encode(self, requests: Sequence[Instance]) -> Batch:
        """The requests' conversations as a batch; one may not be readable by its task, us or the model's processor."""
        where, chats = _where(requests[0]), []
        try:
            for request in requests:
                _, doc_to_messages, _, doc_id, task, split = request.args
                where, document = _where(request), self.task_dict[task][split][doc_id]
                chats.append(read_chat(doc_to_messages(document), where, self.max_num_frames))
            return self.mllm.encode_chats(chats)
        except DyvteError:
            raise
        except Exception as error:  # tasks, decoders and processors raise errors of many kinds
            raise BrokenSample(where, f"{type(error).__name__}: {' '.join(str(error).split())}") from error

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
        """Write the log, and hand means over the requests that were answered to lmms-eval."""
        if self.log_file is not None:
            with self.log_file.open("a") as file:
                file.writelines(json.dumps(note) + "\n" for note in notes)
        answered = [note for note in notes if "error" not in note]
        seconds = sum(note["seconds"] for note in answered)
        tokens = sum(note["new_tokens"] for note in answered)
        count = max(len(answered), 1)
        means = {"mean_exit_layer": sum(note["exit_layer"] for note in answered) / count}
        if self.count_flops:
            means["mean_prefill_flops"] = sum(note["prefill_flops"] for note in answered) / count
        log_metrics(
            total_gen_tokens=tokens,
            total_elapsed_time=seconds,
            avg_speed=tokens / seconds if seconds else 0.0,
            additional_metrics={
                **means,
                "seconds_per_question": seconds / count,
                "unanswered": len(notes) - len(answered),
            },
        )

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Not available: policies are about answering."""
        raise NotImplementedError("dyvte generates answers; choose a generate_until task")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not available: one prompt, one answer."""
        raise NotImplementedError("dyvte answers one prompt at a time; choose a generate_until task")


def _where(request: Instance) -> str:
    """How messages name a request."""
    return f"task {request.args[4]}, document {request.args[3]}"


def _check_answered(notes: Sequence[dict[str, Any]]) -> None:
    if notes and all("error" in note for note in notes):
        raise ConfigError(f"none of the first {len(notes)} requests could be answered: {notes[0]['error']}")


def _cut(text: str, stops: Sequence[str]) -> str:
    """An answer up to the first of the strings that end it."""
    for stop in stops:
        text = text.split(stop)[0] if stop else text
    return text.strip()
