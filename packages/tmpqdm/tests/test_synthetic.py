"""The claims on synthetic layers, with margins."""

import pytest
from tmpqdm.synthetic import SKIP_WEIGHTS, learned_gain, mixture_errors, split_gain


def test_splitting_pays_where_the_skip_matters():
    gains = [split_gain(weight) for weight in SKIP_WEIGHTS]
    assert gains == sorted(gains)
    assert 0.9 < gains[0] < 1.2 and gains[1] > 1.2 and gains[2] > 10 and gains[3] > 40


@pytest.mark.parametrize("bits", [4, 3])
def test_learning_pays_at_few_bits(bits):
    assert learned_gain(bits, iterations=300) > 1.3


def test_a_mixture_from_the_solver_is_as_good_as_its_own_calibration():
    errors = mixture_errors(iterations=12, samples=4, rounding_rate=0.2, step_rate=1e-2)
    assert errors.solver <= 1.05 * errors.alone
    assert errors.solver < errors.nearest
