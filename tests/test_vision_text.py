"""Similarity of patches and a text, by a small random CLIP model that has the vision tower of a small random LLaVA."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import EOS, QUESTION_WORDS, VOCABULARY, _tokenizer, processor_for
from test_policies import batch_of, kept_under, model
from test_scorer_policies import picture
from test_vision_methods import tower_of
from torch.nn.functional import cosine_similarity
from transformers import CLIPConfig, CLIPModel

import dyvte
from dyvte.errors import ModelError, UnsupportedError
from dyvte.instrument.vision_text import TextSimilarity

ROOM = 10
"""Most ids of a text that the text tower takes."""


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    text = {**size, "vocab_size": VOCABULARY, "max_position_embeddings": ROOM, "eos_token_id": EOS}
    vision = {**size, "image_size": 8, "patch_size": 2}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(folder)
    _tokenizer({}).save_pretrained(folder)
    return folder


@torch.no_grad()
def test_it_is_the_cosine_in_clips_common_space_piece_by_piece(clip: Path) -> None:
    similarity, reference = TextSimilarity.load(str(clip)), CLIPModel.from_pretrained(clip)
    features = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    words = QUESTION_WORDS.split()
    found = similarity(features, " ".join(words))
    pieces = [words[start : start + ROOM - 2] for start in range(0, len(words), ROOM - 2)]
    assert found.shape == (5, len(pieces))
    tokenizer = _tokenizer({})
    patches = reference.visual_projection(reference.vision_model.post_layernorm(features))
    for column, piece in enumerate(pieces):
        ids = [tokenizer.bos_token_id, *tokenizer.convert_tokens_to_ids(piece), tokenizer.eos_token_id]
        text = reference.get_text_features(input_ids=torch.tensor([ids]))
        text = getattr(text, "pooler_output", text)
        torch.testing.assert_close(found[:, column], cosine_similarity(patches, text))
    assert similarity(features, "").shape == (5, 1)


def test_cdpruner_takes_minus_this_similarity_for_relevance(clip: Path) -> None:
    mllm = dyvte.wrap(model("llava").model, processor_for("llava"))
    batch = batch_of(mllm, (1, 2, 0))
    policy = dyvte.CDPruner(keep=5, text_tower=str(clip))
    _, kept = kept_under(policy, mllm, batch)
    assert (kept[0] & batch.layout.visual).sum(1).tolist() == [5, 10, 0]
    features = torch.randn(4, 32, generator=torch.Generator().manual_seed(1))
    layers = dict.fromkeys((-1, -2), features)
    ids = mllm.tokenizer.convert_tokens_to_ids(["what", "color", "?"])
    tokens = picture(hidden=features, tower=tower_of(4, states=layers), mllm=mllm, text_ids=torch.tensor(ids))
    assert tokens.question.split() == ["what", "color", "?"]
    cosines = TextSimilarity.load(str(clip))(features, "what color ?")[:, 0]
    relevance = policy.score(tokens)
    assert relevance.argmin() == cosines.argmax()
    assert relevance.argmax() == cosines.argmin()
    assert float(relevance.max()) == pytest.approx(1, abs=1e-3)


def test_what_does_not_fit_is_said_in_one_line(clip: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="32 wide, the model's vision tower is 48 wide"):
        TextSimilarity.load(str(clip))(torch.zeros(2, 48), "what")
    with pytest.raises(ModelError, match=r"text_tower=.*no CLIP model"):
        TextSimilarity.load(str(tmp_path / "nothing"))
    mllm = model("llava")  # without a processor
    with pytest.raises(UnsupportedError, match="reads the question"), dyvte.CDPruner(text_tower=str(clip))(mllm):
        mllm.model(**batch_of(mllm, (1,)))
