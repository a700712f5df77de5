"""Train the testbed by LLaVA's recipe: ``python -m dyvte.testbed.train`` (Hydra, ``conf/testbed.yaml``).

Stages, each with its own checkpoints, resumed where they stopped:

language   the decoder learns scenes described in words, questions about them, and arithmetic (no image)
vision     the tower learns, without questions, which attributes lie under each patch; frozen from then on
align      the projector alone learns to caption images with the frozen decoder (LLaVA's stage 1)
instruct   projector and decoder learn to answer questions about images (LLaVA's stage 2), in phases

A batch is a pure function of (seed, stage, step), so a killed and resumed run equals an uninterrupted one.
"""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import LlavaForConditionalGeneration
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dyvte.config import command
from dyvte.errors import ConfigError
from dyvte.store import write_atomic
from dyvte.testbed.lookups import brief, look_up
from dyvte.testbed.model import TestbedSizes, build_model
from dyvte.testbed.packing import IGNORE, Branch, PackedBatch, pack
from dyvte.testbed.questions import CAPTION_PROMPT, IMAGE_KINDS, KINDS, ask, caption
from dyvte.testbed.tokenizer import ASSISTANT, BOS, EOS, IMAGE, SYSTEM_PROMPT, USER, build_processor
from dyvte.testbed.tours import TOUR_PROMPT, tour
from dyvte.testbed.world import (
    ATTRIBUTES,
    COLUMNS,
    GRID,
    IMAGE_SIZE,
    MAX_OBJECTS,
    MIN_OBJECTS,
    ROWS,
    VALUES,
    Scene,
    patch_labels,
    render,
    sample_scene,
    scene_generator,
)

STAGES = ("language", "vision", "align", "instruct")
MAX_HOPS = max(KINDS.values())
CAPTION_OFFSET = 10**7  # instruction's caption scenes are not the alignment's


def phases(cfg: DictConfig) -> list[tuple[str, DictConfig]]:
    """The phases of instruction in order: the name of each one's files, and the settings with its own put in.

    The last is named as the stage. Each phase draws scenes from a seed of its own.

    Raises:
        ConfigError: a phase without settings under ``phases``.
    """
    chosen = list(cfg.instruct.phases)
    if unknown := [p for p in chosen if p not in cfg.phases]:
        raise ConfigError(f"instruct.phases names {unknown}; phases are {sorted(cfg.phases)}")
    if not chosen:
        return [("instruct", cfg)]
    found = []
    for number, phase in enumerate(chosen):
        settings = {"instruct": cfg.phases[phase].settings, "kind_weights": cfg.phases[phase].kind_weights}
        merged = OmegaConf.merge(cfg, settings, {"seed": cfg.seed + number})
        assert isinstance(merged, DictConfig)
        found.append(("instruct" if number == len(chosen) - 1 else f"instruct_{phase}", merged))
    return found


# ---------------------------------------------------------------- speed
def _matmul_attention(  # type: ignore[no-untyped-def]
    module, query, key, value, attention_mask, scaling=None, **_
) -> tuple[Tensor, None]:
    """Attention as two matrix products: on a CPU with bfloat16 units, twice as fast to train as the fused kernel."""
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = (query * scaling) @ key.transpose(-1, -2)
    if attention_mask is not None:
        scores = scores + attention_mask
    return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None


@contextmanager
def fast_training(device: torch.device, precision: str) -> Iterator[None]:
    """Autocast to ``precision`` and, on a CPU, attention by matrix products."""
    original = ALL_ATTENTION_FUNCTIONS["sdpa"]
    if device.type == "cpu":
        ALL_ATTENTION_FUNCTIONS["sdpa"] = _matmul_attention
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            yield
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = original


def choose_precision(requested: str, device: torch.device) -> str:
    """``auto``: bfloat16 on a GPU and on CPUs with bfloat16 units (four times float32's speed there), else float32."""
    if requested != "auto":
        return requested
    native = torch.cuda.is_bf16_supported() if device.type == "cuda" else torch.backends.mkldnn.is_available()
    if device.type == "cpu":
        native = native and bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())
    return "bf16" if native else "fp32"


# ---------------------------------------------------------------- batches
class Batches:
    """The training batches of every stage, each a pure function of (seed, stage, step)."""

    def __init__(self, cfg: DictConfig, sizes: TestbedSizes) -> None:
        self.cfg, self.sizes = cfg, sizes
        self.tokenizer = build_processor(sizes.patch_size).tokenizer
        self.pad_id: int = self.tokenizer.pad_token_id
        self.head = self.ids(f"{BOS} {SYSTEM_PROMPT} {USER}")
        self.image = self.ids(IMAGE) * sizes.visual_tokens
        names, shares = zip(*cfg.kind_weights.items(), strict=True)
        self.kinds: tuple[str, ...] = names
        self.shares = np.array(shares, dtype=float) / sum(shares)

    def ids(self, text: str) -> list[int]:
        """Token ids of words, without the start token."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def branch(self, kind: str, question: str, answer: str) -> Branch:
        """A question with its answer and end token, in the chat format."""
        return Branch(kind, self.ids(f"{question} {ASSISTANT}"), self.ids(f"{answer} {EOS}"))

    def tour(self, scene: Scene, rng: np.random.Generator) -> Branch:
        """A tour of the scene; only what the image decides carries the full loss."""
        words = tour(scene, rng, self.cfg.tour_stops)
        answer = [*self.ids(" ".join(w.text for w in words)), *self.ids(EOS)]
        return Branch("tour", self.ids(f"{TOUR_PROMPT} {ASSISTANT}"), answer, [*(w.decided for w in words), False])

    def look_ups(self, scene: Scene, rng: np.random.Generator, number: int, hops: int) -> list[Branch]:
        """At most ``number`` different look-ups of at most ``hops`` hops."""
        found: dict[str, tuple[str, str]] = {}
        shares = np.array(self.cfg.instruct.look_up_steps[:hops], dtype=float)
        for steps in rng.choice(len(shares), size=2 * number, p=shares / shares.sum()):
            if len(found) == number:
                break
            a_brief = rng.random() < self.cfg.instruct.brief_share
            one = brief(scene, rng, hops) if a_brief else look_up(scene, rng, int(steps))
            if one is not None:
                found[one[0]] = ("brief" if a_brief else "look_up", one[1])
        return [Branch(kind, self.ids(prompt), self.ids(answer)) for prompt, (kind, answer) in found.items()]

    def rng(self, stage: str, step: int) -> np.random.Generator:
        """The random generator of one step of a stage."""
        return np.random.default_rng([self.cfg.seed, STAGES.index(stage), step])

    def max_objects(self, stage: str, progress: float) -> int:
        """Scenes grow from three objects to all of them over the first ``curriculum`` of a stage."""
        curriculum = self.cfg[stage].curriculum
        grown = min(progress / curriculum, 1.0) if curriculum else 1.0
        return 3 + round(grown * (MAX_OBJECTS - 3))

    def questions(self, scene: Scene, rng: np.random.Generator, number: int, max_hops: int = MAX_HOPS) -> list[Branch]:
        """At most ``number`` different questions of at most ``max_hops`` each about a scene, kinds by their weights."""
        branches, seen = [], set()
        shares = self.shares * np.array([KINDS[k] <= max_hops for k in self.kinds])
        for kind in rng.choice(len(self.kinds), size=2 * number, p=shares / shares.sum()):
            question = ask(scene, self.kinds[kind], rng, tries=4)
            if question is not None and question.text not in seen:
                seen.add(question.text)
                branches.append(self.branch(question.kind, question.text, question.answer))
            if len(branches) == number:
                break
        return branches

    def descriptions(self, scene: Scene, rng: np.random.Generator, number: int) -> list[Branch]:
        """Tours of a scene, a ``caption_share`` of them replaced by captions."""
        return [
            self.branch("caption", CAPTION_PROMPT, caption(scene, rng))
            if rng.random() < self.cfg.caption_share
            else self.tour(scene, rng)
            for _ in range(number)
        ]

    def language(self, step: int, progress: float, size: int, stage: str = "language") -> PackedBatch:
        """Scenes in words, each with a tour (or the scene again in another order) and questions."""
        rng, rows = self.rng(stage, step), []
        for i in range(size):
            scene = sample_scene("text", self.cfg.seed, step * size + i, MIN_OBJECTS, self.max_objects(stage, progress))
            branches = self.descriptions(scene, rng, 1) + self.questions(scene, rng, self.cfg.language.questions)
            rows.append(([*self.head, *self.ids(f"the image shows {caption(scene, rng)} .")], branches))
        weight = self.cfg.language.prompt_weight
        return pack(rows, self.cfg.language.length, self.pad_id, weight, prefix_weight=weight)

    def align(self, step: int, size: int) -> tuple[PackedBatch, Tensor]:
        """Images of caption scenes (which no question is ever asked about) with tours and captions."""
        rng = self.rng("align", step)
        scenes = [sample_scene("caption", self.cfg.seed, step * size + i) for i in range(size)]
        rows = [([*self.head, *self.image], self.descriptions(s, rng, self.cfg.align.descriptions)) for s in scenes]
        return pack(rows, self.cfg.align.length, self.pad_id, self.cfg.align.prompt_weight), pixels(scenes)

    @property
    def prefix(self) -> list[int]:
        """What stands before a question: the system prompt and the image, for the blind control no image."""
        return self.head if self.cfg.instruct.blind else [*self.head, *self.image]

    def _images(self, scenes: list[Scene]) -> Tensor | None:
        return None if self.cfg.instruct.blind else pixels(scenes)

    def instruct(self, step: int, progress: float, size: int) -> tuple[PackedBatch, Tensor | None]:
        """Images of question scenes with a random mix of questions, and of caption scenes with look-ups."""
        rng = self.rng("instruct", step)
        settings = self.cfg.instruct
        early, late = settings.look_up_share
        share = 0.0 if settings.blind else late + (early - late) * max(1 - progress / settings.curriculum, 0.0)
        hops = 1 + sum(progress >= start for start in settings.more_hops_from)
        rows, scenes = [], []
        for i in range(size):
            index = step * size + i
            if rng.random() < share:
                scene = sample_scene("caption", self.cfg.seed, CAPTION_OFFSET + index)
                branches = self.look_ups(scene, rng, settings.look_ups, hops)
                if rng.random() < self.cfg.caption_share:
                    branches.insert(0, self.branch("caption", CAPTION_PROMPT, caption(scene, rng)))
            else:
                scene = sample_scene("train", self.cfg.seed, index)
                branches = self.questions(scene, rng, settings.questions, hops)
            rows.append((self.prefix, branches))
            scenes.append(scene)
        return pack(rows, settings.length, self.pad_id, settings.prompt_weight), self._images(scenes)

    def instruct_or_text(self, step: int, progress: float) -> tuple[PackedBatch, Tensor | None]:
        """A batch of images, or with probability ``text_share`` one of scenes in words."""
        size = self.cfg.instruct.batch_size
        # the draw that picks a batch of text must not be the first of the batch itself
        if self.rng("instruct", 10**8 + step).random() < self.cfg.instruct.text_share and not self.cfg.instruct.blind:
            return self.language(10**6 + step, progress, size, stage="instruct"), None
        return self.instruct(step, progress, size)

    def validation(self, number: int) -> tuple[PackedBatch, Tensor | None]:
        """Images of validation scenes with look-ups and one question of every image kind that each admits."""
        rows, scenes = [], []
        for index in range(number):
            scene = sample_scene("validation", 0, index)
            rng = scene_generator("validation", 0, index, purpose=2)
            asked = [q for k in IMAGE_KINDS if (q := ask(scene, k, rng)) is not None]
            branches = [self.branch(q.kind, q.text, q.answer) for q in asked]
            if not self.cfg.instruct.blind:
                branches += self.look_ups(scene, rng, 6, 1)
            rows.append((self.prefix, branches))
            scenes.append(scene)
        return pack(rows, self.cfg.instruct.length, self.pad_id), self._images(scenes)


def pixels(scenes: list[Scene]) -> Tensor:
    """Images as the processor prepares them: float32 [B, 3, H, W] in [-1, 1]."""
    images = torch.from_numpy(np.stack([render(s) for s in scenes]))
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1.0


# ---------------------------------------------------------------- forward passes
def visual_features(model: LlavaForConditionalGeneration, images: Tensor) -> Tensor:
    """Patch features [B, V, vision width] of the tower, as LLaVA takes them (class token dropped)."""
    return model.model.vision_tower(images).last_hidden_state[:, 1:]


def words_of_patches(model: LlavaForConditionalGeneration, scenes: list[Scene], batches: Batches) -> Tensor:
    """For every patch the sum of the embeddings of the words for what lies under it and where it is: [B, V, width]."""
    table = model.get_input_embeddings().weight.detach()
    named = {**VALUES, "row": ROWS, "column": COLUMNS}
    words = {a: table[torch.tensor(batches.ids(" ".join(values)))] for a, values in named.items()}
    labels = [patch_labels(s, batches.sizes.patch_size) for s in scenes]
    side = IMAGE_SIZE // batches.sizes.patch_size
    total = torch.zeros(len(scenes), side * side, table.shape[1], device=table.device)
    for name, known in words.items():
        label = torch.from_numpy(np.stack([x[name] for x in labels])).to(table.device)
        if name in VALUES:  # class 0 is background, of which there is nothing to say
            known = torch.cat([torch.zeros_like(known[:1]), known])
        else:
            label = label * GRID // side
        total += known[label]
    return total


def initialise_projector(
    model: LlavaForConditionalGeneration, scenes: list[Scene], batches: Batches, steps: int = 300, lr: float = 3e-3
) -> float:
    """Start the projector where each patch says its words: the sum of their embeddings (``words_of_patches``).

    First a standardisation of the tower's features is folded in, whose large common vector would otherwise hide what
    tells patches apart; then the projector is fitted by least squares. Returns the relative squared error left.
    """
    projector = model.model.multi_modal_projector
    with torch.no_grad():
        features = torch.cat(
            [visual_features(model, pixels(scenes[i : i + 50]).to(model.device)) for i in range(0, len(scenes), 50)]
        ).flatten(0, 1)
        mean, deviation = features.mean(0), features.std(0).clamp_min(1e-6)
        first = projector.linear_1
        nn.init.normal_(first.weight, std=first.in_features**-0.5)
        first.weight.div_(deviation)
        first.bias.copy_(-first.weight @ mean)
        nn.init.zeros_(projector.linear_2.bias)
    target = words_of_patches(model, scenes, batches).flatten(0, 1)
    optimizer = torch.optim.Adam(projector.parameters(), lr=lr)
    scale, left = float(target.square().mean()), float("nan")
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        chosen = torch.randint(len(features), (4096,)).to(features.device)
        error = (projector(features[chosen]) - target[chosen]).square().mean() / scale
        optimizer.zero_grad(set_to_none=True)
        error.backward()
        optimizer.step()
        left = float(error.detach())
    return left


def hidden_states(
    model: LlavaForConditionalGeneration, decoder: Callable[..., Any], batch: PackedBatch, features: Tensor | None
) -> Tensor:
    """Final hidden states [B, N, width] of packed sequences, ``features`` standing at the image positions."""
    embeds = model.get_input_embeddings()(batch.input_ids)
    if features is not None:
        projected = model.model.multi_modal_projector(features)
        at_image = (batch.input_ids == model.config.image_token_id).unsqueeze(-1)
        embeds = embeds.masked_scatter(at_image, projected.to(embeds.dtype))
    autocast = torch.is_autocast_enabled(embeds.device.type)
    mask = batch.attention_mask(torch.bfloat16 if autocast else torch.float32)
    return decoder(
        inputs_embeds=embeds, attention_mask=mask, position_ids=batch.position_ids, use_cache=False
    ).last_hidden_state


def packed_loss(model: LlavaForConditionalGeneration, states: Tensor, batch: PackedBatch) -> Tensor:
    """Weighted mean cross-entropy (nats) over the labelled positions."""
    chosen = batch.labels != IGNORE
    logits = model.lm_head(states[chosen]).float()
    losses = cross_entropy(logits, batch.labels[chosen], reduction="none")
    weights = batch.weights[chosen]
    return (losses * weights).sum() / weights.sum()


@torch.no_grad()
def packed_accuracy(
    model: LlavaForConditionalGeneration, batch: PackedBatch, images: Tensor | None, chunk: int = 32
) -> dict[str, float]:
    """Teacher-forced accuracy by kind: of one-word answers (exactly greedy accuracy), of a tour's decided words."""
    right: dict[str, list[float]] = defaultdict(list)
    for start in range(0, len(batch.input_ids), chunk):
        part = slice(start, start + chunk)
        piece = batch.rows(part)
        features = visual_features(model, images[part]) if images is not None else None
        states = hidden_states(model, model.model.language_model, piece, features)
        correct = model.lm_head(states).argmax(-1) == piece.labels
        answered = piece.weights == 1.0
        for (row, number), kind in batch.kinds.items():
            if start <= row < start + chunk:
                mine = answered[row - start] & (piece.branch[row - start] == number)
                hits = correct[row - start][mine].float()
                if len(hits):
                    right[kind].append(float(hits.mean() if kind == "tour" else hits.min()))
    return {k: float(np.mean(v)) for k, v in right.items()}


# ---------------------------------------------------------------- the loop
def learning_rate(step: int, steps: int, peak: float, warmup: float, decay: float) -> float:
    """Linear warm-up, a constant stretch, then a cosine to zero over the last ``decay`` share of the steps."""
    if step < warmup * steps:
        return peak * (step + 1) / (warmup * steps)
    rest = (step - (1 - decay) * steps) / (decay * steps)
    return peak * (0.5 * (1 + math.cos(math.pi * min(rest, 1.0))) if rest > 0 else 1.0)


def _save(path: Path, content: dict[str, Any]) -> None:
    write_atomic(path, lambda out: torch.save(content, out))


class _Steps(Dataset[Any]):
    """Batches by step, so that a worker process can prepare the next ones."""

    def __init__(self, batch_of: Callable[[int, float], Any], steps: int) -> None:
        self.batch_of, self.steps = batch_of, steps

    def __getitem__(self, step: int) -> Any:
        return self.batch_of(step, step / self.steps)


def run_stage(
    name: str,
    folder: Path,
    modules: dict[str, nn.Module],
    cfg: DictConfig,
    batch_of: Callable[[int, float], Any],
    loss_of: Callable[..., Tensor],
    evaluate: Callable[[], dict[str, float]] | None,
    seed_everything: int,
    workers: int,
) -> None:
    """Train ``modules`` for one stage; resume from, and write, ``folder/<name>.pt``. A finished stage is a no-op.

    Args:
        batch_of: maps (step, progress 0..1) to a batch; all randomness must come from the step.
        loss_of: maps a batch to its loss.
        cfg: the stage's settings (steps, lr, warmup, decay, weight_decay, clip, checkpoint_every, eval_every).
    """
    path = folder / f"{name}.pt"
    parameters = [p for m in modules.values() for p in m.parameters()]
    groups = []
    for key, module in modules.items():
        scale = cfg.get("projector_rate", 1.0) if key == "projector" else 1.0  # of instruction only
        for decay, matrix in ((cfg.weight_decay, True), (0.0, False)):
            chosen = [p for p in module.parameters() if (p.ndim >= 2) == matrix]
            groups.append({"params": chosen, "weight_decay": decay, "scale": scale})
    optimizer = torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, 0.98))
    first, seconds = 0, 0.0
    if path.exists():
        saved = torch.load(path, weights_only=True)
        for key, module in modules.items():
            module.load_state_dict(saved["modules"][key])
        first, seconds = saved["step"], saved["seconds"]
        if first < cfg.steps:
            optimizer.load_state_dict(saved["optimizer"])
    if first >= cfg.steps:
        return
    torch.manual_seed(seed_everything)
    from torch.utils.tensorboard import SummaryWriter

    log = (folder / f"{name}.jsonl").open("a")
    started = time.monotonic()
    with SummaryWriter(str(folder / "tensorboard" / name), purge_step=first) as board, log:
        bar = tqdm(range(first, cfg.steps), initial=first, total=cfg.steps, desc=name, mininterval=5.0)
        running = float("nan")
        steps = DataLoader(
            _Steps(batch_of, cfg.steps), batch_size=None, sampler=range(first, cfg.steps), num_workers=workers
        )
        for step, batch in zip(bar, steps, strict=True):
            rate = learning_rate(step, cfg.steps, cfg.lr, cfg.warmup, cfg.decay)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["scale"]
            loss = loss_of(batch)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(parameters, cfg.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            value = float(loss.detach())
            if not math.isfinite(value):
                raise FloatingPointError(f"testbed stage {name}: loss is {value} at step {step}; lower {name}.lr")
            running = value if math.isnan(running) else 0.95 * running + 0.05 * value
            bar.set_postfix(loss=f"{running:.3f}", lr=f"{rate:.1e}", refresh=False)
            board.add_scalar(f"{name}/loss", value, step)
            done = step + 1
            if done % cfg.eval_every == 0 or done == cfg.steps:
                elapsed = seconds + time.monotonic() - started
                record: dict[str, Any] = {"stage": name, "step": done, "seconds": round(elapsed, 1), "loss": running}
                record |= {"grad_norm": float(norm)} | (evaluate() if evaluate else {})
                for key, number in record.items():
                    if isinstance(number, float):
                        board.add_scalar(f"{name}/{key}", number, done)
                log.write(json.dumps(record) + "\n")
                log.flush()
                tqdm.write(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in record.items()}))
            if done % cfg.checkpoint_every == 0 or done == cfg.steps:
                content: dict[str, Any] = {"modules": {k: m.state_dict() for k, m in modules.items()}, "step": done}
                content["seconds"] = seconds + time.monotonic() - started
                if done < cfg.steps:
                    content["optimizer"] = optimizer.state_dict()
                _save(path, content)


def continue_from(model: LlavaForConditionalGeneration, folder: Path) -> None:
    """Start from an exported model, such as the one that ships; its sizes and vocabulary must be this run's."""
    exported = LlavaForConditionalGeneration.from_pretrained(folder, local_files_only=True).state_dict()
    wanted = model.state_dict()
    if differing := [k for k in wanted if k not in exported or exported[k].shape != wanted[k].shape]:
        raise ConfigError(
            f"init_from={folder} holds a model of other sizes or words ({differing[0]} and {len(differing) - 1} more "
            "differ): set sizes.* to its own"
        )
    model.load_state_dict(exported)


def load_stages(folder: Path, stages: list[str], modules: dict[str, nn.Module]) -> None:
    """Load what the finished ``stages`` of another run learnt, in order; missing checkpoints are passed over."""
    if not folder.is_dir():
        raise ConfigError(f"init_from={folder} is not a folder of a testbed run")
    for path in (folder / f"{s}.pt" for s in stages):
        if path.exists():
            saved = torch.load(path, weights_only=True)["modules"]
            for key in modules.keys() & saved.keys():
                modules[key].load_state_dict(saved[key])


class PatchHeads(nn.Module):
    """Linear read-outs of each patch's attributes and place, for the tower's pretraining only."""

    def __init__(self, width: int, side: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        sizes = {a: 1 + len(VALUES[a]) for a in ATTRIBUTES} | {"row": side, "column": side}
        self.heads = nn.ModuleDict({name: nn.Linear(width, size) for name, size in sizes.items()})

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        """Logits [B, V, 1 + values] of every attribute from features [B, V, width]; class 0 is background."""
        features = self.norm(features)
        return {a: head(features) for a, head in self.heads.items()}


def _vision_batch(cfg: DictConfig, sizes: TestbedSizes, step: int, split: str) -> tuple[Tensor, dict[str, Tensor]]:
    size = cfg.vision.batch_size
    scenes = [sample_scene(split, cfg.seed, step * size + i) for i in range(size)]
    labels = [patch_labels(s, sizes.patch_size) for s in scenes]
    return pixels(scenes), {a: torch.from_numpy(np.stack([x[a] for x in labels])) for a in labels[0]}


def train(cfg: DictConfig, folder: Path) -> LlavaForConditionalGeneration:
    """Run the configured stages; returns the model after the last of them."""
    sizes = TestbedSizes(**OmegaConf.to_container(cfg.sizes))  # type: ignore[arg-type]
    if unknown := [s for s in cfg.stages if s not in STAGES]:
        raise ConfigError(f"unknown testbed stages {unknown}: stages= takes a list from {list(STAGES)}")
    device = torch.device(cfg.device)
    precision = choose_precision(cfg.precision, device)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    model = build_model(sizes, cfg.seed).to(device)
    batches = Batches(cfg, sizes)
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    language = model.model.language_model
    decoder = torch.compile(language, dynamic=False) if cfg.compile else language
    talk = nn.ModuleDict({"decoder": language, "lm_head": model.lm_head})

    def loss(packed: tuple[PackedBatch, Tensor | None]) -> Tensor:
        batch, images = packed[0].to(device), packed[1]
        with fast_training(device, precision):
            features = None
            if images is not None:
                with torch.no_grad():
                    features = visual_features(model, images.to(device))
            states = hidden_states(model, decoder, batch, features)
        return packed_loss(model, states.float(), batch)

    held_out: list[tuple[PackedBatch, Tensor | None]] = []

    def image_accuracy() -> dict[str, float]:
        if not held_out:
            held_out.append(batches.validation(cfg.validation_scenes))
        batch, images = held_out[0]
        with fast_training(device, precision):
            found = packed_accuracy(model, batch.to(device), None if images is None else images.to(device))
        return {"accuracy": float(np.mean([v for k, v in found.items() if k in IMAGE_KINDS]))} | found

    def language_accuracy() -> dict[str, float]:
        batch = batches.language(10**6, 1.0, cfg.validation_scenes)  # a step that training never reaches
        with fast_training(device, precision):
            return packed_accuracy(model, batch.to(device), None)

    if cfg.init_from:
        parts = {"tower": tower, "projector": projector, "talk": talk}
        source = Path(cfg.init_from)
        if (source / "config.json").is_file():
            continue_from(model, source)
        else:
            load_stages(source, [s for s in STAGES if s not in cfg.stages], parts)
    heads = PatchHeads(sizes.vision_width, IMAGE_SIZE // sizes.patch_size).to(device)

    def patch_loss(batch: tuple[Tensor, dict[str, Tensor]]) -> Tensor:
        images, labels = batch
        with fast_training(device, precision):
            outputs = heads(visual_features(model, images.to(device)))
        losses = [cross_entropy(outputs[a].float().flatten(0, 1), labels[a].to(device).flatten()) for a in outputs]
        return torch.stack(losses).sum()

    @torch.no_grad()
    def patch_accuracy() -> dict[str, float]:
        images, labels = _vision_batch(cfg, sizes, 0, "validation")
        with fast_training(device, precision):
            outputs = heads(visual_features(model, images.to(device)))
        on_object = labels["color"] > 0
        return {a: float((outputs[a].argmax(-1).cpu() == labels[a])[on_object].float().mean()) for a in outputs}

    for name in (s for s in STAGES if s in cfg.stages):
        stage = cfg[name]
        common: dict[str, Any] = {"folder": folder, "cfg": stage, "seed_everything": cfg.seed, "workers": cfg.workers}
        if name == "language":
            run_stage(
                name,
                modules={"talk": talk},
                batch_of=lambda step, progress: (batches.language(step, progress, cfg.language.batch_size), None),
                loss_of=loss,
                evaluate=language_accuracy,
                **common,
            )
        elif name == "vision":
            run_stage(
                name,
                modules={"tower": tower, "heads": heads},
                batch_of=lambda step, progress: _vision_batch(cfg, sizes, step, "vision"),
                loss_of=patch_loss,
                evaluate=patch_accuracy,
                **common,
            )
        elif name == "align":
            tower.requires_grad_(False)
            talk.requires_grad_(False)
            if not (folder / "align.pt").exists():
                torch.manual_seed(cfg.seed)
                fitted = [sample_scene("caption", cfg.seed, i) for i in range(cfg.align.projector_scenes)]
                left = initialise_projector(model, fitted, batches)
                tqdm.write(f"projector starts at the words of the patches, relative squared error {left:.3f}")
            run_stage(
                name,
                modules={"projector": projector},
                batch_of=lambda step, progress: batches.align(step, cfg.align.batch_size),
                loss_of=loss,
                evaluate=image_accuracy,
                **common,
            )
            talk.requires_grad_(True)
        else:
            tower.requires_grad_(False)
            for phase, settings in phases(cfg):
                run_stage(
                    phase,
                    modules={"projector": projector, "talk": talk},
                    batch_of=Batches(settings, sizes).instruct_or_text,
                    loss_of=loss,
                    evaluate=image_accuracy,
                    **{**common, "cfg": settings.instruct, "seed_everything": settings.seed},
                )
    return model


def export(model: LlavaForConditionalGeneration, patch_size: int, folder: Path) -> None:
    """Write model and processor in transformers format, as ``AutoModelForImageTextToText`` reads it."""
    model.float().save_pretrained(folder)
    build_processor(patch_size).save_pretrained(folder)


@command("testbed")
def main(cfg: DictConfig) -> None:
    """Train the configured stages; after the last one write the model in transformers format."""
    folder = Path(cfg.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(cfg, folder / "config.yaml", resolve=True)
    model = train(cfg, folder)
    if "instruct" in cfg.stages:
        export(model, cfg.sizes.patch_size, folder / "model")
        print(f"model written to {folder / 'model'}")


if __name__ == "__main__":
    main()
