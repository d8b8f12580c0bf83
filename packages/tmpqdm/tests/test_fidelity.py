"""Successive halving and rank correlations."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from papercore.errors import InputError
from scipy.stats import spearmanr
from tmpqdm.fidelity import rank_correlation, successive_halving


def test_halving():
    calls = []

    def score(candidate: int, images: int) -> float:
        calls.append((candidate, images))
        return candidate if images > 10 else (candidate * 7) % 8  # cheap scores mislead

    found = successive_halving(list(range(8)), score, [10, 100, 1000])
    first = [(c, 10) for c in range(8)]
    assert calls[:8] == first and len(calls) == 8 + 4 + 2
    assert [len(rung.values) for rung in found.rungs] == [8, 4, 2]
    survivors = sorted(range(8), key=lambda c: (c * 7) % 8)[:4]
    assert found.ranked[:2] == sorted(survivors)[:2] and set(found.ranked) == set(range(8))
    assert found.rungs[0].correlation is None and found.rungs[1].correlation is not None


def test_ties_keep_the_older_and_infinity_goes_last():
    found = successive_halving(["a", "b", "c"], lambda c, n: {"a": 1.0, "b": 1.0, "c": float("inf")}[c], [5])
    assert found.ranked == ["a", "b", "c"]


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=3, max_size=20))
def test_correlation_is_spearmans(pairs):
    first, second = zip(*pairs, strict=True)
    found = rank_correlation(first, second)
    if len(set(first)) == 1 or len(set(second)) == 1:
        assert found is None
    else:
        assert found == pytest.approx(spearmanr(first, second).statistic)


def test_wrong_rounds():
    for rounds, keep in (([], 0.5), ([5, 5], 0.5), ([5], 0)):
        with pytest.raises(InputError):
            successive_halving([1], lambda c, n: 0.0, rounds, keep=keep)
    assert rank_correlation([1, 2], [1, 2]) is None
