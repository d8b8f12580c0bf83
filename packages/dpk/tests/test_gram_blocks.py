"""Gram matrices in blocks, as they are computed on a CPU, against the plain product."""

import pytest
import torch
from dpk import alignment
from dpk.alignment import gram, gram_in_blocks, grams
from hypothesis import given, settings
from hypothesis import strategies as st


@given(st.integers(0, 10_000), st.integers(1, 11), st.integers(1, 23))
@settings(max_examples=40, deadline=None)
def test_blocks_of_any_size_give_the_product(seed, n, p):
    x = torch.randn(n, p, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    kept = x.clone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(alignment, "BLOCK", (4, 5))
        found = gram_in_blocks(x)
    torch.testing.assert_close(found, grams(x[None])[0], rtol=1e-10, atol=1e-12)
    assert torch.equal(found, found.T)
    assert torch.equal(x, kept)


def test_large_and_low_precision_features():
    x = torch.randn(130, 3, 40, 50, generator=torch.Generator().manual_seed(0))
    flat = x.double().flatten(1)
    expected = (flat - flat.mean(0)) @ (flat - flat.mean(0)).T
    torch.testing.assert_close(gram(x + 300), expected, rtol=1e-3, atol=0.5)
    torch.testing.assert_close(gram(x), expected, rtol=1e-5, atol=1e-2)
    assert gram(x.bfloat16()).dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):  # does not reach the product
        torch.testing.assert_close(gram(x), expected, rtol=1e-5, atol=1e-2)


def test_constant_features_are_exactly_zero_and_nan_stays():
    assert not gram(torch.full((70, 5000), 0.1)).any()
    x = torch.randn(70, 20)
    x[65, 3] = torch.nan
    assert torch.isnan(gram(x)).all()  # through the mean
