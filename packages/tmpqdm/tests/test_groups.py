"""Timestep groups against the published lists."""

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from papercore.diffusion import linear_alphas_cumprod
from papercore.errors import InputError
from tmpqdm.groups import TimestepGroups

CASES = json.loads((Path(__file__).parent / "golden" / "groups.json").read_text())
MAKE = {
    "quad": lambda n, t: TimestepGroups.quadratic(n, t, allow_fewer=True),
    "uniform_published": TimestepGroups.uniform,
    "quad_solver_grid": lambda n, t: TimestepGroups.solver_grid(n, t, allow_fewer=True),
}
# where the number of steps does not divide T, the published code makes a group too many
MADE = [case for case in CASES if case["method"] != "uniform_published" or case["T"] % case["N"] == 0]


@pytest.mark.parametrize("case", MADE, ids=lambda c: f"{c['method']}-{c['N']}")
def test_golden(case):
    groups = MAKE[case["method"]](case["N"], case["T"])
    assert list(groups.edges) == case["edges"]
    assert groups.n_groups == case["n_groups"]
    if "first" in case:
        assert list(groups.first()) == case["first"]
    if "log10_lists" in case:
        assert groups.log10_size() == pytest.approx(case["log10_lists"], abs=1e-6)
    if "log10_unconstrained" in case:
        count = case["n_groups"] if case["method"] == "quad_solver_grid" else case["N"]
        assert groups.log10_unconstrained(count) == pytest.approx(case["log10_unconstrained"], abs=1e-6)


@given(st.integers(2, 20), st.integers(20, 1500), st.integers(0, 2**32))
def test_a_drawn_list_has_one_timestep_in_every_group(steps, total, seed):
    for groups in (
        TimestepGroups.quadratic(steps, total, allow_fewer=True),
        TimestepGroups.uniform(steps, total),
        TimestepGroups.solver_grid(min(steps, total - 1), total, allow_fewer=True),
    ):
        for rng in (random.Random(seed), np.random.default_rng(seed)):
            drawn = groups.sample(rng)
            assert groups.contains(drawn)
            assert list(drawn) == sorted(set(drawn))
        assert groups.contains(groups.first())
        assert groups.log10_size() <= groups.log10_unconstrained() + 1e-9


def test_groups_of_equal_signal_to_noise_and_around_a_list():
    alphas = linear_alphas_cumprod().tolist()
    groups = TimestepGroups.log_snr(10, alphas)
    snr = [math.log(alphas[t] / (1 - alphas[t])) for t in (*groups.edges[:-1], 999)]
    differences = np.diff(snr)
    assert np.abs(differences[1:] / differences.mean() - 1).max() < 0.1
    assert TimestepGroups.fitted([0, 9, 39], 100).edges == (0, 5, 24, 100)
    assert TimestepGroups.fitted([3, 4], 10).contains([3, 4])


def test_bad_input():
    with pytest.raises(InputError, match=r"29 groups for 30 steps.*allow_fewer"):
        TimestepGroups.quadratic(30)
    for call, words in (
        (lambda: TimestepGroups.quadratic(1), "from 2 to 1000"),
        (lambda: TimestepGroups.uniform(0), "from 1 to 1000"),
        (lambda: TimestepGroups.uniform(1001), "from 1 to 1000"),
        (lambda: TimestepGroups((0, 5, 5, 1000)), "edges of groups"),
        (lambda: TimestepGroups((1, 5, 1000)), "edges of groups"),
        (lambda: TimestepGroups((0, 5.5, 1000)), "edges of groups"),
        (lambda: TimestepGroups.fitted([4, 3], 10), "timesteps"),
        (lambda: TimestepGroups.log_snr(3, [0.5, 0.6]), "alphas_cumprod|steps"),
    ):
        with pytest.raises(InputError, match=words):
            call()
