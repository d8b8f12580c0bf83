"""CKA against a slow definition, and its invariances."""

import itertools

import pytest
import torch
from dpk.alignment import MinibatchCKA, cka, grams, hsics, token_samples
from hypothesis import given, settings
from hypothesis import strategies as st
from papercore.errors import InputError


def slow_hsic1(k: torch.Tensor, m: torch.Tensor) -> float:
    """HSIC1 as the average over all quadruples of different samples (Song et al. 2012, equation 4)."""
    n = len(k)
    total, count = 0.0, 0
    for i, j, q, r in itertools.permutations(range(n), 4):
        total += float(k[i, j] * (m[i, j] + m[q, r] - 2 * m[i, q]))
        count += 1
    return total / count


def features(seed: int, n: int, p: int) -> torch.Tensor:
    return torch.randn(n, p, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("n", [4, 6, 7])
def test_hsic_is_the_average_over_quadruples(n):
    x, y = features(0, n, 3), features(1, n, 5)
    k, m = x @ x.T, y @ y.T
    expected = [slow_hsic1(k, m), slow_hsic1(k, k), slow_hsic1(m, m)]
    torch.testing.assert_close(hsics(x, y), torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)


@given(st.integers(0, 10_000), st.integers(4, 24), st.floats(0.01, 100), st.booleans())
@settings(max_examples=40, deadline=None)
def test_rotations_scales_and_shifts_change_nothing(seed, n, scale, unbiased):
    x, y = features(seed, n, 5), features(seed + 1, n, 7)
    rotation = torch.linalg.qr(features(seed + 2, 5, 5))[0]
    moved = scale * x @ rotation + features(seed + 3, 1, 5)
    expected = cka(x, y, unbiased)
    torch.testing.assert_close(cka(moved, y, unbiased), expected, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(cka(y, x, unbiased), expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(cka(x, moved, unbiased), torch.ones_like(expected), rtol=1e-7, atol=1e-9)


def test_the_centre_does_not_cost_float32_its_digits():
    x, y = features(0, 32, 40), features(1, 32, 40)
    mixed = x + 0.5 * y
    expected = float(cka(x, mixed))
    found = float(cka((x + 1000).float(), (mixed - 3000).float()))
    assert found == pytest.approx(expected, abs=2e-3)
    assert cka(torch.full((8, 4), 0.1), torch.randn(8, 4)) == 0


def test_undefined_values_are_zero_and_nan_is_not_hidden():
    x = features(0, 3, 4)
    assert cka(x, x) == 0
    assert cka(x[:1], x[:1], unbiased=False) == 0
    bad = features(0, 6, 4)
    bad[2, 1] = torch.nan
    assert torch.isnan(cka(bad, features(1, 6, 4)))
    with pytest.raises(InputError, match=r"samples: found '?6 and 5"):
        cka(bad, features(0, 5, 4))
    with pytest.raises(InputError, match="at least one"):
        cka(bad[:0], bad[:0])


def test_minibatches_pool_and_small_ones_are_left_out():
    pooled = MinibatchCKA()
    for seed, n in ((0, 8), (2, 3), (4, 6)):
        pooled.update(features(seed, n, 5), features(seed + 1, n, 5))
    parts = torch.stack([hsics(features(s, n, 5), features(s + 1, n, 5)) for s, n in ((0, 8), (4, 6))]).mean(0)
    assert int(pooled.count) == 2
    torch.testing.assert_close(pooled.compute(), parts[0] / (parts[1] * parts[2]).sqrt())
    again = MinibatchCKA()
    again.load_state_dict(pooled.state_dict())
    assert again.compute() == pooled.compute()
    pooled.reset()
    assert pooled.compute() == 0


def test_gram_matrices_of_a_stack_are_those_of_its_matrices():
    x = torch.stack([features(0, 5, 3), features(1, 5, 3)])
    torch.testing.assert_close(grams(x)[1], grams(x[1:])[0])


def test_pixels_as_samples_share_a_grid():
    x, y = token_samples(torch.randn(2, 3, 40, 20), torch.randn(2, 5, 24, 12))
    assert x.shape == (256, 3)
    assert y.shape == (256, 5)
    x, y = token_samples(torch.randn(1, 3, 4, 6), torch.randn(1, 5, 8, 12))
    assert x.shape == (24, 3)
