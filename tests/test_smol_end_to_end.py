"""The shipped parts of `llava_smol` on its real language model, fetched once and kept in the cache."""

import warnings

import pytest

import dyvte
from dyvte.data.english import EnglishDataset
from dyvte.testbed.smol import assemble as assembling

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def mllm():
    if not assembling.is_assembled():
        try:
            assembling.assemble()
        except dyvte.ModelError as error:
            warnings.warn(f"llava_smol is NOT TESTED: {error}", stacklevel=1)
            pytest.skip(f"no language model: {error}")
    return dyvte.load("llava_smol", device="cpu")


def test_it_answers_what_training_taught_it(mllm):
    """Questions of one hop, far above the rate of guessing; exact numbers are on docs/testbed_smol.md."""
    dataset = EnglishDataset(limit=8, kinds=["attribute"], paraphrases="held_out", seed=7)
    samples = [dataset[i] for i in range(len(dataset))]
    batch = mllm.encode(images=[s.image for s in samples], questions=[s.question for s in samples])
    answers = mllm.generate(batch)
    right = sum(given == sample.answer for given, sample in zip(answers, samples, strict=True))
    assert right >= 6, list(zip(answers, [s.answer for s in samples], strict=True))


def test_the_image_is_seen_by_thirty_layers_and_needed(mllm):
    assert mllm.num_layers == 30
    dataset = EnglishDataset(limit=2, kinds=["attribute"], seed=8)
    samples = [dataset[i] for i in range(len(dataset))]
    batch = mllm.encode(images=[s.image for s in samples], questions=[s.question for s in samples])
    sweep = dyvte.exit_sweep(mllm, batch)
    assert sweep.agree[:, -1].all()
    assert not sweep.agree[:, 0].all()
    positions = batch["input_ids"] == mllm.model.config.image_token_id
    assert positions.sum(1).tolist() == [144] * len(samples)


def test_its_gates_let_the_image_go_before_the_end_and_keep_the_answers(mllm):
    """On held-out wordings; what they keep and save is told by the README beside them."""
    dataset = EnglishDataset(limit=6, kinds=["arithmetic", "attribute", "relation"], paraphrases="held_out", seed=9)
    samples = [dataset[i] for i in range(len(dataset))]
    batch = mllm.encode(images=[s.image for s in samples], questions=[s.question for s in samples])
    plain = mllm.generate(batch)
    with dyvte.DynamicExit("llava_smol")(mllm) as run:
        gated = mllm.generate(batch)
    assert run.exit_layers.min() < mllm.num_layers
    assert sum(a == b for a, b in zip(plain, gated, strict=True)) >= 5
