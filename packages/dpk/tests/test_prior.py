"""Which tokens are the teacher's."""

import pytest
import torch
from dpk.prior import prior_mask, ranks, scores_of
from hypothesis import given, settings
from hypothesis import strategies as st
from papercore.errors import InputError


@given(st.integers(1, 40), st.floats(-0.5, 1.5, allow_nan=False), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_the_smallest_scores_are_taken(tokens, rho, seed):
    scores = torch.randint(5, (3, tokens), generator=torch.Generator().manual_seed(seed)).float()
    mask = prior_mask(scores, rho)
    share = min(max(rho, 0.0), 1.0)
    count = int(share * tokens + 0.5)
    for row, chosen in zip(scores.tolist(), mask.tolist(), strict=True):
        expected = sorted(range(tokens), key=lambda i: (row[i], i))[:count]
        assert [i for i in range(tokens) if chosen[i]] == sorted(expected)
    assert torch.equal(mask, prior_mask(scores, torch.tensor(rho, dtype=torch.float64)))


def test_a_ratio_for_every_image():
    scores = torch.rand(3, 8, generator=torch.Generator().manual_seed(0))
    mask = prior_mask(scores, torch.tensor([0.0, 0.5, 1.0]))
    assert mask.sum(1).tolist() == [0, 4, 8]
    with pytest.raises(InputError, match="scores: found"):
        prior_mask(scores[0], 0.5)


def test_ranks_invert_the_order():
    assert ranks(torch.tensor([[3.0, 1.0, 2.0, 1.0]])).tolist() == [[3, 0, 2, 1]]


def test_blocks_are_connected_and_errors_come_largest_first():
    generator = torch.Generator().manual_seed(0)
    scores = scores_of("block", 20, (6, 6), generator=generator, device=torch.device("cpu"))
    for mask in prior_mask(scores, 0.25).view(20, 6, 6):
        rows, columns = mask.nonzero().unbind(1)
        assert int(rows.max() - rows.min()) <= 4
        assert int(columns.max() - columns.min()) <= 4
    error = torch.tensor([[0.1, 3.0, 2.0, 0.5]])
    scores = scores_of("highest-error", 1, (2, 2), generator=None, device=torch.device("cpu"), error=error)
    assert prior_mask(scores, 0.5).tolist() == [[False, True, True, False]]
