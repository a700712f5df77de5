"""The tensor functions behind the policies, against loops that do the same one token at a time."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dyvte.policies.merging.pooling import average_blocks, block_of
from dyvte.policies.merging.tome import bipartite_soft_matching, merge
from dyvte.policies.pruning.fitprune import deletable
from dyvte.policies.token_scores import (
    attention_rows,
    drop_lowest,
    evenly_spaced,
    images,
    keep_count,
    most_diverse,
    place_in_image,
    random_subset,
    received_head_max,
    stratified_subset,
    tokens_in_image,
)

seeds = st.integers(0, 999)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_visual(g: torch.Generator, rows: int = 3, length: int = 14) -> Tensor:
    return torch.rand(rows, length, generator=g) < 0.6


@settings(derandomize=True, deadline=None, max_examples=30)
@given(seed=seeds)
def test_images_are_runs_of_visual_positions(seed: int) -> None:
    visual = random_visual(generator(seed))
    image, (place, size) = images(visual), place_in_image(visual)
    for row in range(len(visual)):
        number, at = -1, 0
        for position in range(visual.shape[1]):
            if not visual[row, position]:
                assert image[row, position] == place[row, position] == -1
                assert size[row, position] == 0
                continue
            new = position == 0 or not visual[row, position - 1]
            number, at = (number + 1, 0) if new else (number, at + 1)
            assert image[row, position] == number
            assert place[row, position] == at
            assert size[row, position] == int((image[row] == number).sum())
    counted = visual & (torch.rand(visual.shape, generator=generator(seed + 1)) < 0.5)
    found = tokens_in_image(image, counted)
    for row, position in visual.nonzero().tolist():
        assert found[row, position] == int((counted[row] & (image[row] == image[row, position])).sum())


@settings(derandomize=True, deadline=None, max_examples=30)
@given(seed=seeds, share=st.floats(0, 1), ties=st.booleans())
def test_drop_lowest_keeps_the_highest(seed: int, share: float, ties: bool) -> None:
    g = generator(seed)
    candidates = random_visual(g)
    scores = torch.rand(candidates.shape, generator=g)
    if ties:
        scores = (scores * 3).floor()
        scores[scores == 0] = -torch.inf
    keep = keep_count(share, candidates)
    dropped = drop_lowest(scores, candidates, keep)
    assert not (dropped & ~candidates).any()
    for row in range(len(candidates)):
        places = candidates[row].nonzero().flatten().tolist()
        best = sorted(places, key=lambda place: (-float(scores[row, place]), place))[: int(keep[row])]
        stays = (candidates[row] & ~dropped[row]).nonzero().flatten().tolist()
        assert sorted(best) == stays


@settings(derandomize=True, deadline=None, max_examples=50)
@given(size=st.integers(1, 150), share=st.floats(0, 1), seed=seeds)
def test_subsets_have_the_right_size_and_stratified_ones_cover_the_grid(size: int, share: float, seed: int) -> None:
    keep = round(size * share)
    for chosen in (
        evenly_spaced(size, keep),
        random_subset(size, keep, generator(seed)),
        stratified_subset(size, keep, generator(seed)),
    ):
        assert len(chosen) == len(set(chosen.tolist())) == keep
        assert all(0 <= each < size for each in chosen.tolist())
        assert chosen.tolist() == sorted(chosen.tolist())


def test_a_stratified_quarter_of_a_grid_takes_one_of_every_block() -> None:
    chosen = stratified_subset(64, 16, generator(0))
    blocks = {(int(each) // 8 // 2, int(each) % 8 // 2) for each in chosen}
    assert len(blocks) == 16


def test_random_subsets_are_uniform() -> None:
    g = generator(0)
    for draw in (random_subset, stratified_subset):
        counts = torch.zeros(16)
        for _ in range(2000):
            counts[draw(16, 4, g)] += 1
        assert ((counts / 2000 - 0.25).abs() < 0.05).all()


@settings(derandomize=True, deadline=None, max_examples=20)
@given(seed=seeds, share=st.floats(0.1, 1))
def test_most_diverse_is_greedy_max_min(seed: int, share: float) -> None:
    g = generator(seed)
    candidates = random_visual(g, rows=2, length=10)
    features = torch.randn(2, 10, 5, generator=g)
    keep = keep_count(share, candidates)
    left_out = most_diverse(features, candidates, keep)
    unit = features / features.norm(dim=-1, keepdim=True)
    for row in range(2):
        pool = candidates[row].nonzero().flatten().tolist()

        def distance(a: int, b: int, row: int = row) -> float:
            return 1 - float(unit[row, a] @ unit[row, b])

        chosen: list[int] = []
        while len(chosen) < int(keep[row]):
            others = chosen or pool
            rest = [each for each in pool if each not in chosen]
            chosen.append(
                max(rest, key=lambda a: min((distance(a, b) for b in others if b != a), default=float("inf")))
            )
        assert sorted(chosen) == (candidates[row] & ~left_out[row]).nonzero().flatten().tolist()


@settings(derandomize=True, deadline=None, max_examples=20)
@given(seed=seeds, merges=st.integers(0, 6))
def test_matching_merges_the_most_similar_pairs_of_each_image(seed: int, merges: int) -> None:
    g = generator(seed)
    visual = random_visual(g, rows=2)
    group = images(visual)
    metric = torch.randn(2, visual.shape[1], 4, generator=g)
    leaves, into = bipartite_soft_matching(metric, group, torch.full_like(group, merges))
    unit = metric / metric.norm(dim=-1, keepdim=True)
    for row in range(2):
        expected = {}
        for image in range(int(group[row].max()) + 1):
            members = (group[row] == image).nonzero().flatten().tolist()
            sources, targets = members[::2], members[1::2]
            edges = []
            for source in sources:
                similarity = [float(unit[row, source] @ unit[row, target]) for target in targets]
                if targets:
                    edges.append((max(similarity), source, targets[similarity.index(max(similarity))]))
            edges.sort(key=lambda edge: -edge[0])
            expected |= {source: target for _, source, target in edges[:merges]}
        found = {place: int(into[row, place]) for place in leaves[row].nonzero().flatten().tolist()}
        assert found == expected
        stays = ~leaves[row]
        assert torch.equal(into[row, stays], torch.arange(visual.shape[1])[stays])


@settings(derandomize=True, deadline=None, max_examples=20)
@given(seed=seeds)
def test_merging_keeps_the_sum_and_the_number_of_tokens(seed: int) -> None:
    g = generator(seed)
    visual = random_visual(g, rows=2)
    features = torch.randn(2, visual.shape[1], 3, generator=g, dtype=torch.float64)
    size = torch.randint(1, 4, visual.shape, generator=g).float()
    leaves, into = bipartite_soft_matching(features, images(visual), torch.full(visual.shape, 3))
    merged, new_size = merge(features, size, leaves, into)
    before = (features * size[:, :, None]).sum(1)
    after = (merged * new_size[:, :, None])[~leaves].new_zeros(before.shape)
    for row in range(2):
        after[row] = (merged[row] * new_size[row, :, None])[~leaves[row]].sum(0)
        assert new_size[row, ~leaves[row]].sum() == size[row].sum()
    torch.testing.assert_close(after, before)
    untouched = (new_size == size) & ~leaves
    assert torch.equal(merged[untouched], features[untouched])


def test_the_log_of_its_size_makes_a_merged_key_count_as_its_copies() -> None:
    g = generator(0)
    query, key = torch.randn(1, 2, 3, 4, generator=g), torch.randn(1, 2, 5, 4, generator=g)
    copies = torch.tensor([1, 3, 1, 2, 1])
    every = attention_rows(query, key.repeat_interleave(copies, dim=2), torch.ones(1, 3, 8, dtype=torch.bool), 0.5)
    bias = copies.float().log().expand(1, 1, 3, 5)
    merged = attention_rows(query, key, torch.ones(1, 3, 5, dtype=torch.bool), 0.5, bias)
    expected = torch.stack([part.sum(-1) for part in every.split(copies.tolist(), dim=-1)], dim=-1)
    torch.testing.assert_close(merged, expected)


@settings(derandomize=True, deadline=None, max_examples=10)
@given(seed=seeds, entries=st.sampled_from([1, 40, 10**6]))
def test_head_max_does_not_depend_on_the_chunks(seed: int, entries: int) -> None:
    g = generator(seed)
    query, key = torch.randn(2, 4, 6, 8, generator=g), torch.randn(2, 2, 6, 8, generator=g)
    allowed = torch.ones(6, 6, dtype=torch.bool).tril().expand(2, -1, -1)
    weights = torch.rand(2, 3, 6, generator=g)
    whole = attention_rows(query, key, allowed, 0.3)
    torch.testing.assert_close(whole.sum(-1), torch.ones(2, 4, 6))
    assert (whole.masked_select(~allowed[:, None]) == 0).all()
    found = received_head_max(
        lambda part: attention_rows(query[:, :, part], key, allowed[:, part], 0.3), weights, 4, 6, entries
    )
    torch.testing.assert_close(found, weights @ whole.amax(1))


@settings(derandomize=True, deadline=None, max_examples=20)
@given(seed=seeds, alpha=st.floats(0, 1))
def test_what_remains_after_deleting_is_at_least_one_minus_alpha(seed: int, alpha: float) -> None:
    g = generator(seed)
    received = torch.rand(3, 2, 9, generator=g)
    remaining = torch.rand(3, 9, generator=g) < 0.9
    gone = deletable(received, remaining, alpha)
    assert not (gone & ~remaining).any()
    total = received.sum(-1)
    left = (received * (remaining & ~gone)[:, None]).sum(-1)
    already = (received * remaining[:, None]).sum(-1)
    # Nothing more is deleted where too much is lost already.
    assert ((left >= (1 - alpha) * total - 1e-5) | torch.isclose(left, already)).all()
    for row in range(3):
        sets = []
        for part in range(2):
            order = sorted(remaining[row].nonzero().flatten().tolist(), key=lambda i: float(received[row, part, i]))
            lost, found = float(total[row, part] - already[row, part]), set()
            for token in order:
                lost += float(received[row, part, token])
                if lost > alpha * float(total[row, part]) + 1e-6:
                    break
                found.add(token)
            sets.append(found)
        assert set(gone[row].nonzero().flatten().tolist()) == sets[0] & sets[1]


def test_blocks_are_averaged_like_a_pooling_layer() -> None:
    features = torch.randn(1, 36 + 4, 5, generator=generator(0))
    visual = torch.zeros(1, 40, dtype=torch.bool)
    visual[:, 3:39] = True
    place, size = place_in_image(visual)
    for side in (1, 2, 3, 4):
        block, first = block_of(place, size.double(), side)
        pooled = average_blocks(features, images(visual), block)[first]
        grid = features[0, 3:39].T.reshape(1, 5, 6, 6)
        expected = torch.nn.functional.avg_pool2d(grid, side, ceil_mode=True)
        torch.testing.assert_close(pooled, expected.flatten(2)[0].T)
