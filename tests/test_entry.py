"""How others' code comes in: plain, compiled and PEFT models, batches by rows, greedy whatever a checkpoint says."""

import copy
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from families import FAMILIES, IMAGE_TOKEN, VIDEO_TOKEN, VISION_END, VISION_START, random_batch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import DynamicCache, GenerationConfig

import dyvte
from dyvte.batch import Batch
from dyvte.layout import TokenLayout
from dyvte.mllm import MLLM

QUIET = {"eos_token_id": [10**4]}


@cache
def model(family: str) -> MLLM:
    return FAMILIES[family](0, num_layers=4)


def batch_of(mllm: MLLM, images=(1, 1), seed: int = 0, **kwargs) -> Batch:
    return random_batch(mllm, torch.Generator().manual_seed(seed), images, **kwargs)


def argmax_by_hand(mllm: MLLM, batch: Batch, steps: int) -> list[list[int]]:
    """Greedy ids by full forwards, without `generate` and without a cache."""
    rows = []
    for row in range(len(batch["input_ids"])):
        inputs = dict(batch[[row]])
        ids: list[int] = []
        for _ in range(steps):
            with torch.no_grad():
                token = mllm.model(**inputs, use_cache=False).logits[:, -1].argmax(-1)
            ids.append(int(token))
            inputs["input_ids"] = torch.cat([inputs["input_ids"], token[:, None]], 1)
            inputs["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(token[:, None])], 1)
        rows.append(ids)
    return rows


# ---------------------------------------------------------------- greedy means argmax
NOISY = {
    "repetition_penalty": 1.7,
    "encoder_repetition_penalty": 1.7,
    "num_beams": 3,
    "num_return_sequences": 2,
    "no_repeat_ngram_size": 1,
    "encoder_no_repeat_ngram_size": 1,
    "suppress_tokens": list(range(60)),
    "begin_suppress_tokens": list(range(60)),
    "bad_words_ids": [[i] for i in range(60)],
    "sequence_bias": [[[5], 50.0]],
    "forced_bos_token_id": 7,
    "forced_eos_token_id": 7,
    "min_length": 90,
    "min_new_tokens": 9,
    "max_length": 3,
    "max_new_tokens": 1,
    "guidance_scale": 3.0,
    "exponential_decay_length_penalty": (1, 2.0),
    "remove_invalid_values": True,
    "renormalize_logits": True,
    "do_sample": True,
    "temperature": 9.0,
    "top_k": 2,
    "top_p": 0.1,
    "min_p": 0.3,
    "typical_p": 0.2,
    "cache_implementation": "hybrid",
    "use_cache": False,
    "return_dict_in_generate": True,
    "output_scores": True,
    "penalty_alpha": 0.5,
    "stop_strings": ["a"],
    "max_time": 1e-6,
    "prompt_lookup_num_tokens": 2,
    "prefill_chunk_size": 2,
    "token_healing": True,
}
SPECIAL = {"bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"}


def noise(name: str, value):
    """A value that differs from the default, for attributes whose meaning is not known here."""
    if name in NOISY:
        return NOISY[name]
    if isinstance(value, bool) or value is None:
        return not value
    return value + 1 if isinstance(value, (int, float)) else value


@pytest.mark.parametrize("name", sorted(set(GenerationConfig().to_dict()) - SPECIAL))
def test_no_entry_of_a_checkpoints_generation_config_changes_greedy_answers(name: str):
    mllm = model("llava")
    batch = batch_of(mllm)
    wanted = mllm.generate_ids(batch, max_new_tokens=4, **QUIET)
    assert [row[: len(ids)] for row, ids in zip(argmax_by_hand(mllm, batch, 4), wanted, strict=True)] == wanted
    own = mllm.model.generation_config
    noisy = copy.deepcopy(own)
    setattr(noisy, name, noise(name, getattr(own, name, None)))
    mllm.model.generation_config = noisy
    try:
        assert mllm.generate_ids(batch, max_new_tokens=4, **QUIET) == wanted
        assert mllm.model.generation_config is noisy
        with dyvte.FixedExit(2)(mllm):
            under_exit = mllm.generate_ids(batch, max_new_tokens=4, **QUIET)
    finally:
        mllm.model.generation_config = own
    with dyvte.FixedExit(2)(mllm):
        assert mllm.generate_ids(batch, max_new_tokens=4, **QUIET) == under_exit


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_agreement_of_the_sweep_is_that_of_generation_under_every_exit(seed: int):
    mllm = model("llava")
    batch = batch_of(mllm, seed=seed)
    own = mllm.model.generation_config
    mllm.model.generation_config = GenerationConfig(**{**own.to_dict(), "repetition_penalty": 1.5, "num_beams": 2})
    try:
        full = mllm.generate_ids(batch, max_new_tokens=3, **QUIET)
        if len({len(ids) for ids in full}) > 1:
            return
        sweep = dyvte.exit_sweep(mllm, batch, answer_ids=torch.tensor(full))
        for k in range(mllm.num_layers + 1):
            with dyvte.FixedExit(k)(mllm):
                given_ids = mllm.generate_ids(batch, max_new_tokens=3, **QUIET)
            assert [a == b for a, b in zip(given_ids, full, strict=True)] == sweep.agree[:, k].tolist()
    finally:
        mllm.model.generation_config = own


def test_callers_settings_still_count_and_answers_end_where_the_caller_says():
    mllm = model("llava")
    batch = batch_of(mllm)
    free = mllm.generate_ids(batch, max_new_tokens=6, **QUIET)
    penalised = mllm.generate_ids(batch, max_new_tokens=6, repetition_penalty=5.0, **QUIET)
    assert all(len(set(ids)) == len(ids) for ids in penalised)
    end = free[0][1]
    cut = mllm.generate_ids(batch, max_new_tokens=6, eos_token_id=end)
    assert cut[0] == free[0][: free[0].index(end) + 1]


# ---------------------------------------------------------------- models
def test_a_policy_and_a_probe_take_a_plain_model_in_its_mode():
    mllm = model("llava")
    batch = batch_of(mllm)
    with dyvte.FixedExit(1)(mllm):
        wanted = mllm(**batch).logits
    plain = copy.deepcopy(mllm.model)
    with torch.no_grad(), dyvte.FixedExit(1)(plain) as run:
        assert torch.equal(plain(**batch).logits, wanted)
    assert run.exit_layers.tolist() == [1, 1]
    with dyvte.AttentionProbe(plain) as probe:
        plain(**batch)
    assert probe.stats.mass.shape[1] == mllm.num_layers
    plain.train()
    with dyvte.FixedExit(1)(plain):
        assert plain.training
    for policy in (dyvte.FastV(layer=1, keep=0.5), dyvte.ToMe(merges=1), dyvte.SkipAttention(layers=[2])):
        with policy(plain.eval()):
            plain(**batch)
    with (
        pytest.raises(dyvte.ModelError, match="expected an MLLM or a transformers model, got str"),
        dyvte.FixedExit(1)("m"),
    ):
        pass


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_generate_of_a_peft_model_runs_under_policies_and_probes(family: str):
    """Against the same adapter merged into the weights."""
    inner = copy.deepcopy(model(family).model)
    torch.manual_seed(0)
    tuned = get_peft_model(inner, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)).eval()
    merged = MLLM(copy.deepcopy(tuned).merge_and_unload())
    batch = batch_of(merged)
    quiet = {
        "suppress_tokens": [IMAGE_TOKEN, VIDEO_TOKEN, VISION_START, VISION_END],
        "pad_token_id": 0,
        "do_sample": False,
    }
    for k in (0, 2, 4):
        with dyvte.FixedExit(k)(merged):
            wanted = merged.model.generate(**batch, max_new_tokens=4, eos_token_id=[10**4], **quiet)
        with dyvte.FixedExit(k)(tuned) as run:
            assert torch.equal(tuned.generate(**batch, max_new_tokens=4, eos_token_id=[10**4], **quiet), wanted)
        assert run.exit_layers.tolist() == [k, k]
        with dyvte.FixedExit(k)(tuned), torch.no_grad():
            forward = tuned(**batch).logits
        with dyvte.FixedExit(k)(merged), torch.no_grad():
            assert torch.allclose(forward, merged(**batch).logits, atol=1e-4)
    with dyvte.AttentionProbe(tuned) as probe:
        tuned.generate(**batch, max_new_tokens=2, **quiet)
    with dyvte.AttentionProbe(merged) as reference:
        merged(**batch)
    torch.testing.assert_close(probe.stats.mass, reference.stats.mass, equal_nan=True, atol=1e-5, rtol=1e-4)


def test_training_with_checkpointing_says_what_to_do_before_generating():
    plain = copy.deepcopy(model("llava").model)
    plain.gradient_checkpointing_enable()
    plain.train()
    with dyvte.FixedExit(1)(plain), pytest.raises(dyvte.UnsupportedError, match=r"call model\.eval\(\)"):
        plain.generate(**batch_of(model("llava")), max_new_tokens=2)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_pass_a_policy_with_checkpointing(reentrant: bool):
    batch = batch_of(model("llava"))
    found = []
    for checkpointing in (False, True):
        plain = copy.deepcopy(model("llava").model).train()
        if checkpointing:
            plain.gradient_checkpointing_enable({"use_reentrant": reentrant})
            plain.enable_input_require_grads()
        with dyvte.FixedExit(2)(plain):
            plain(**batch, use_cache=False).logits.square().sum().backward()
        found.append({n: p.grad for n, p in plain.named_parameters() if p.grad is not None and "layers" in n})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("fault", ["missing", "unexpected", "mismatched"])
def test_weights_that_are_not_the_models_stop_a_load(tmp_path: Path, fault: str):
    model("llava").model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = dict(load_file(file))
    name = next(n for n in tensors if "layers.2" in n and "q_proj" in n)
    if fault == "missing":
        del tensors[name]
    elif fault == "unexpected":
        tensors["language_model.model.layers.9.self_attn.q_proj.weight"] = tensors[name].clone()
    else:
        tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(dyvte.ModelError, match="cannot load"):
        dyvte.load(tmp_path, device="cpu")


# ---------------------------------------------------------------- layouts and caches
def test_a_layout_belongs_to_one_prefill():
    mllm = model("llava")
    first, second = (
        batch_of(mllm, seed=1, question_length=5),
        batch_of(mllm, seed=2, question_length=5, system_length=4),
    )
    assert first["input_ids"].shape != second["input_ids"].shape or first.layout != second.layout
    with torch.no_grad(), dyvte.FixedExit(2)(mllm, layout=first.layout):
        mllm(**first)
        with pytest.raises(dyvte.UnsupportedError, match="a layout belongs to one prefill"):
            mllm(**first)
    with (
        dyvte.FixedExit(2)(mllm, layout=first.layout),
        pytest.raises(dyvte.UnsupportedError, match=r"of another batch|none"),
    ):
        mllm(**second)


def test_layouts_compare_by_their_roles():
    roles = torch.tensor([[0, 1, 2]])
    assert TokenLayout(roles) == TokenLayout(roles.clone())
    assert TokenLayout(roles) != TokenLayout(roles + 1)
    assert TokenLayout(roles) != "roles"


def test_a_cache_filled_under_other_gates_is_refused():
    mllm = model("llava")
    batch = batch_of(mllm)
    one, other = (dyvte.Gates(num_layers=4, hidden_size=mllm.hidden_size) for _ in range(2))
    assert repr(dyvte.DynamicExit(one)) == repr(dyvte.DynamicExit(other))
    same = copy.deepcopy(one)
    step = {"input_ids": batch["input_ids"][:, -1:], "attention_mask": torch.ones(2, batch["input_ids"].shape[1] + 1)}
    for gates, refused in ((one, False), (same, False), (other, True)):
        cache = DynamicCache(config=mllm.text_config)
        with torch.no_grad():
            with dyvte.DynamicExit(one)(mllm):
                mllm(**batch, past_key_values=cache, use_cache=True)
            with dyvte.DynamicExit(gates)(mllm):
                if refused:
                    with pytest.raises(dyvte.UnsupportedError, match="their weights differ"):
                        mllm(**step, past_key_values=cache)
                else:
                    mllm(**step, past_key_values=cache)


# ---------------------------------------------------------------- batches by rows
@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=4, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    images=st.lists(st.integers(0, 2), min_size=2, max_size=4).filter(any),
    side=st.sampled_from(["left", "right"]),
)
def test_rows_of_a_batch_are_the_batch_of_the_rows(family: str, seed: int, images: list[int], side: str):
    mllm = model(family)
    batch = batch_of(mllm, images, seed, padding_side=side)
    with torch.no_grad():
        together = mllm(**batch).logits
        order = [len(images) - 1, 0]
        some = batch[order]
        kept = ~some.layout.padding
        assert torch.allclose(mllm(**some).logits[kept], together[order][kept], atol=1e-4)
        again = Batch.cat([batch[:1], batch[1:]])
        for name, value in batch.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(again[name], value), name
    assert again.layout == batch.layout


def test_batches_of_different_lengths_are_joined_with_padding():
    mllm = model("llava")
    short, long = batch_of(mllm, (1,), 1, question_length=4), batch_of(mllm, (2,), 2, question_length=7)
    joined = Batch.cat([short, long])
    with torch.no_grad():
        both = mllm(**joined).logits
        for row, alone in enumerate((short, long)):
            logits = mllm(**alone).logits[0]
            assert torch.allclose(both[row, -len(logits) :], logits, atol=1e-4)
    with pytest.raises(ValueError, match="batches with the same inputs"):
        Batch.cat([short, Batch({"input_ids": long["input_ids"]}, long.layout)])


def test_what_cannot_be_told_apart_by_rows_is_refused():
    mllm = model("llava")
    batch = batch_of(mllm, (1, 2))
    odd = Batch({**batch, "extra": torch.zeros(7, 3)}, batch.layout)
    with pytest.raises(dyvte.UnsupportedError, match="extra"):
        odd[:1]


# ---------------------------------------------------------------- types
def test_every_public_name_is_real_to_a_type_checker(tmp_path: Path):
    names = [name for name in dyvte.__all__ if name != "__version__"]
    lines = [f"reveal_type(dyvte.{name})" for name in names]
    (tmp_path / "uses.py").write_text("import dyvte\n" + "\n".join(lines) + "\n")
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "mypy", "--config-file", str(root / "pyproject.toml"), str(tmp_path / "uses.py")]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    revealed = [line for line in done.stdout.splitlines() if "Revealed type" in line]
    assert len(revealed) == len(names), done.stdout
    assert not [f"{n}: {line}" for n, line in zip(names, revealed, strict=True) if 'is "Any"' in line]
