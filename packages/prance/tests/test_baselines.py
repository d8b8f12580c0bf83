"""Static configurations of equal MACs, and their search."""

import pytest
import torch
from papercore.errors import InputError
from prance.baselines import evaluate_static, pareto, random_static, search_static
from prance.decision import Decision
from prance.macs import Geometry, macs
from prance.space import SearchSpace

SPACE = SearchSpace((24, 32, 40, 48), (1.0, 2.0, 3.0), group=2, depth=8, heads=3, head_dim=16)
GEOMETRY = Geometry(17, 1, 2, 1, 10, SPACE.projected)
FULL = int(macs(GEOMETRY, Decision.largest(SPACE)))


def accuracy(decision: Decision) -> float:
    """Grows with the work of the last blocks only."""
    return float(decision.embed[0, 4:].sum() + decision.prune.sum()) / 200


@pytest.mark.parametrize("tokens", [None, "prune", "merge", "prune_merge"])
def test_random_ones_have_equal_macs(tokens):
    target = 0.55 * FULL
    made = random_static(GEOMETRY, SPACE, tokens, target, count=7, seed=3)
    assert len(made) == 7
    assert ((macs(GEOMETRY, made) - target).abs() <= 0.015 * FULL).all()
    assert (made.embed[:, :2] == 48).all()
    assert (made.prune < 1).all() if tokens in ("prune", "prune_merge") else (made.prune == 1).all()
    assert len(made.embed.unique(dim=0)) > 1
    again = random_static(GEOMETRY, SPACE, tokens, target, count=7, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(made.tensors(), again.tensors(), strict=True))
    found = evaluate_static(GEOMETRY, made, accuracy)
    assert [s.macs for s in found] == macs(GEOMETRY, made).tolist()
    assert found[2].accuracy == accuracy(made[2])


def test_unreachable_macs_are_named():
    with pytest.raises(InputError, match=r"to .* GMAC, where random"):
        random_static(GEOMETRY, SPACE, None, 2.0 * FULL)
    with pytest.raises(InputError, match="token mode"):
        random_static(GEOMETRY, SPACE, "drop", FULL)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="count"):
        random_static(GEOMETRY, SPACE, None, FULL, count=0)


def test_pareto():
    cost = torch.tensor([3.0, 1.0, 2.0, 2.0, 4.0, 1.0])
    score = torch.tensor([0.9, 0.5, 0.7, 0.6, 0.9, 0.5])
    assert pareto(cost, score) == [1, 2, 0]


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_search_goes_on_as_if_it_had_not_been_cut_off(tmp_path):
    def run(trials: int, storage):
        return search_static(GEOMETRY, SPACE, "prune", accuracy, trials=trials, population=6, seed=5, storage=storage)

    whole = run(30, None)
    run(13, tmp_path / "search.log")
    calls = []
    resumed = search_static(
        GEOMETRY,
        SPACE,
        "prune",
        lambda d: calls.append(1) or accuracy(d),
        trials=30,
        population=6,
        seed=5,
        storage=tmp_path / "search.log",
    )
    assert len(calls) == 17
    assert [(s.macs, s.accuracy) for s in resumed] == [(s.macs, s.accuracy) for s in whole]
    for static in whole:
        assert static.macs == int(macs(GEOMETRY, static.decision))
        assert static.accuracy == accuracy(static.decision)
    costs, scores = [s.macs for s in whole], [s.accuracy for s in whole]
    assert costs == sorted(costs)
    assert scores == sorted(scores)
    # later populations find what the first, random one does not
    assert set(costs) - {s.macs for s in run(6, None)}
    with pytest.raises(InputError, match="another search"):
        search_static(GEOMETRY, SPACE, "merge", accuracy, storage=tmp_path / "search.log")


def test_search_refuses():
    with pytest.raises(InputError, match="trials"):
        search_static(GEOMETRY, SPACE, "prune", accuracy, trials=0)
    with pytest.raises(InputError, match="token mode"):
        search_static(GEOMETRY, SPACE, "drop", accuracy)  # pyright: ignore[reportArgumentType]
