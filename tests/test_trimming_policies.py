"""The policies and the pure functions they are made of, without a model."""

from __future__ import annotations

import pytest
import torch

from trimming import Grid, KeepAll, Random, TrimmedLlama, VisualContext
from trimming.attention import summed_attention
from trimming.policies.grid import tile_lattice
from trimming.selection import at_least_one_per_image, ragged_index, ratio_budget, top_k


def context(valid: torch.Tensor, attention: torch.Tensor | None = None, images: int = 1, tokens: int = 10) -> VisualContext:
    ids = tuple(f"sample {i}" for i in range(len(valid)))
    return VisualContext(valid=valid, images=images, tiles=4, tokens=tokens, sample_ids=ids, attention=attention)


def real_tiles(*counts: int, tokens: int = 10) -> torch.Tensor:
    return torch.stack([torch.arange(4 * tokens) < count * tokens for count in counts])


def test_budget_counts_valid_features_only():
    # A quarter of one tile's ten features, not of the forty positions.
    assert ratio_budget(0.25, real_tiles(1, 4, 0)).tolist() == [2, 10, 0]
    assert ratio_budget(0.001, real_tiles(2)).tolist() == [1]
    assert ratio_budget(1.0, real_tiles(3)).tolist() == [30]


def test_top_k_breaks_ties_downwards_and_never_leaves_the_valid():
    scores = torch.tensor([[[1.0, 3.0, 3.0, 3.0, 9.0]]])
    valid = torch.tensor([[True, True, True, True, False]])
    assert top_k(scores, torch.tensor([2]), valid).tolist() == [[[False, True, True, False, False]]]
    assert top_k(scores, torch.tensor([5]), valid).sum() == 4


def test_ragged_index_pads_to_the_longest_and_keeps_order():
    keep = torch.tensor([[False, True, False, True], [True, False, False, False], [False] * 4])
    index, present = ragged_index(keep)
    assert index.tolist() == [[1, 3], [0, 0], [0, 0]]
    assert present.tolist() == [[True, True], [True, False], [False, False]]
    assert ragged_index(keep[2:])[0].shape == (1, 1)


def test_an_image_that_lost_everything_gets_its_best_back():
    keep = torch.tensor([[True, False, False, False, False, False]])
    scores = torch.tensor([[0.0, 0, 1, 7, 0, 0]])
    valid = torch.tensor([[True, True, True, False, False, False]])
    assert at_least_one_per_image(keep, scores, valid, images=3).tolist() == [[True, False, True, False, False, False]]


@pytest.mark.parametrize("chunk", [1, 1 << 24])
def test_summed_attention_equals_the_whole_map(chunk, monkeypatch):
    monkeypatch.setattr("trimming.attention.CHUNK_ELEMENTS", chunk)
    torch.manual_seed(0)
    query, key = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 9, 8)
    mask = torch.zeros(2, 1, 5, 9).masked_fill(torch.rand(2, 1, 5, 9) < 0.3, torch.finfo(torch.float32).min)
    rows = torch.tensor([[True, False, True, True, False], [False, False, True, True, True]])
    whole = (query @ key.repeat_interleave(2, 1).transpose(-1, -2) * 0.5 + mask).softmax(-1)
    wanted = (whole * rows[:, None, :, None]).sum(2)
    torch.testing.assert_close(summed_attention(query, key, mask, rows, 0.5), wanted)


def test_trimmed_llama_keeps_the_union_of_the_heads():
    attention = torch.zeros(1, 2, 40)
    attention[0, 0, [3, 4]] = torch.tensor([2.0, 1.0])
    attention[0, 1, [4, 7]] = torch.tensor([1.0, 2.0])
    attention[0, 1, 39] = 9.0  # a padding tile's
    keep = TrimmedLlama(0.2).select(context(real_tiles(1), attention))
    assert keep[0].nonzero()[:, 0].tolist() == [3, 4, 7]


def test_heads_that_agree_keep_less():
    attention = torch.rand(1, 8, 40)
    agreed = attention[:, :1].expand(-1, 8, -1)
    policy, valid = TrimmedLlama(0.2), real_tiles(4)
    assert policy.select(context(valid, agreed)).sum() == 8
    assert policy.select(context(valid, attention)).sum() > 8


@pytest.mark.parametrize("share", [0.05, 0.3, 0.5, 0.9, 1.0])
def test_controls_keep_exactly_their_share_of_the_valid(share):
    valid = real_tiles(1, 2, 3, 4, tokens=65)
    for policy in (Random(share), Grid(share)):
        keep = policy.select(context(valid, tokens=65))
        assert not (keep & ~valid).any()
        assert keep.sum(-1).tolist() == [round(share * 65 * n) for n in (1, 2, 3, 4)]
    assert torch.equal(KeepAll().select(context(valid, tokens=65)), valid)


def test_random_is_seeded_by_sample_and_by_seed():
    valid = real_tiles(4, 4)
    first, second = Random(0.5).select(context(valid))
    assert not torch.equal(first, second)
    assert torch.equal(Random(0.5).select(context(valid))[0], first)
    assert not torch.equal(Random(0.5, seed=1).select(context(valid))[0], first)


def test_grid_is_even_in_both_directions():
    for count in range(65):
        positions = tile_lattice(65, count)
        assert len(set(positions)) == len(positions) == count
        assert all(1 <= p <= 64 for p in positions)
    cells = [divmod(p - 1, 8) for p in tile_lattice(65, 16)]
    assert sorted({row for row, _ in cells}) == [1, 3, 5, 7]
    assert sorted({column for _, column in cells}) == [1, 3, 5, 7]
    assert tile_lattice(65, 65) == tuple(range(65))
    with pytest.raises(ValueError, match="square of patches"):
        tile_lattice(64, 3)
