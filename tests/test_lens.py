"""dyvte.logit_lens against transformers' own hidden states."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, random_batch

from dyvte import FixedExit, exit_sweep, logit_lens
from dyvte.errors import ConfigError, UnsupportedError

LAYERS = 3


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("positions", "side"), [("visual", "left"), ("last", "right"), ("mask", "left")])
@torch.no_grad()
def test_reads_the_hidden_states_of_a_plain_forward(family: str, positions: str, side: str) -> None:
    mllm = FAMILIES[family](num_layers=LAYERS)
    batch = random_batch(mllm, torch.Generator().manual_seed(0), (1, 2, 0), side)
    chosen = {
        "visual": batch.layout.visual,
        "last": torch.arange(batch.layout.roles.shape[1]) == batch.layout.last_prompt[:, None],
        "mask": batch.layout.text & (torch.arange(batch.layout.roles.shape[1]) % 2 == 0),
    }[positions]
    lens = logit_lens(mllm, batch, chosen if positions == "mask" else positions, top=4)  # type: ignore[arg-type]
    output = mllm.model(**batch, output_hidden_states=True)
    norm = mllm.decoder.norm
    # transformers gives the last hidden state behind the norm
    states = [norm(each) for each in output.hidden_states[:-1]] + [output.hidden_states[-1]]
    answer = output.logits[torch.arange(3), batch.layout.last_prompt].argmax(-1)
    assert torch.equal(lens.answer_ids, answer)
    for layer, state in enumerate(states):
        if family == "qwen3_vl" and positions == "visual" and 0 < layer < LAYERS:
            continue  # DeepStack adds to visual positions between layers; the lens reads what left the layer
        probabilities = mllm.lm_head(state).softmax(-1)
        for row in range(3):
            places = chosen[row].nonzero().flatten()
            count = len(places)
            assert lens.positions[row].tolist() == [*places.tolist(), *[-1] * (lens.positions.shape[1] - count)]
            expected = probabilities[row, places]
            torch.testing.assert_close(
                lens.probabilities[row, layer, :count], expected.topk(4).values, atol=1e-5, rtol=0
            )
            named = expected.gather(-1, lens.ids[row, layer, :count])
            torch.testing.assert_close(lens.probabilities[row, layer, :count], named, atol=1e-5, rtol=0)
            torch.testing.assert_close(
                lens.answer_probability[row, layer, :count], expected[:, answer[row]], atol=1e-5, rtol=0
            )
            assert lens.answer_probability[row, layer, count:].isnan().all()
            assert (lens.ids[row, layer, count:] == -1).all()


@pytest.mark.parametrize("exit_layer", [0, 2])
def test_under_an_exit_the_end_is_what_that_exit_predicts(exit_layer: int) -> None:
    mllm = FAMILIES["llava"](num_layers=LAYERS)
    batch = random_batch(mllm, torch.Generator().manual_seed(0), (1, 1), "left")
    answers = torch.tensor([[7], [9]])
    lens = logit_lens(mllm, batch, "last", answer_ids=answers, policy=FixedExit(layer=exit_layer))
    plain = logit_lens(mllm, batch, "last", answer_ids=answers)
    sweep = exit_sweep(mllm, batch, answers, entropy=False)
    torch.testing.assert_close(lens.answer_probability[:, -1, 0], (-sweep.nll[:, exit_layer]).exp(), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        lens.answer_probability[:, : exit_layer + 1], plain.answer_probability[:, : exit_layer + 1], atol=1e-6, rtol=0
    )
    assert not torch.allclose(lens.answer_probability[:, -1], plain.answer_probability[:, -1], atol=1e-4)


def test_refusals() -> None:
    mllm = FAMILIES["llava"](num_layers=LAYERS)
    batch = random_batch(mllm, torch.Generator().manual_seed(0), (1, 1))
    with pytest.raises(ConfigError, match="under a policy"):
        logit_lens(mllm, batch, policy=FixedExit(1))
    with pytest.raises(ConfigError, match="positions is 'first'"):
        logit_lens(mllm, batch, "first")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="top is 0"):
        logit_lens(mllm, batch, top=0)
    with pytest.raises(ConfigError, match="no image"):
        logit_lens(mllm, random_batch(mllm, torch.Generator().manual_seed(0), (0,)))
    with FixedExit(1)(mllm), pytest.raises(UnsupportedError, match="policy="):
        logit_lens(mllm, batch)
