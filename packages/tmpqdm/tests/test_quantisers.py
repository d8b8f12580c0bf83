"""Uniform quantisers: golden numbers of the published classes, and properties."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from papercore.errors import InputError
from papercore.quant import RangeObserver
from tmpqdm.quantisers import (
    LearnedStep,
    SplitStep,
    Step,
    check_menu,
    range_parameters,
    tensor_parameters,
    weight_parameters,
)

GOLDEN = Path(__file__).parent / "golden"
WEIGHTS, ACTIVATIONS = np.load(GOLDEN / "uaq_weight.npz"), np.load(GOLDEN / "uaq_act.npz")
WEIGHT_CASES = json.loads((GOLDEN / "uaq_weight.json").read_text())
ACTIVATION_CASES = [
    case for case in json.loads((GOLDEN / "uaq_act.json").read_text()) if case["method"] in ("max", "mse")
]


def tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.asarray(array))


def both_signs(x: torch.Tensor) -> torch.Tensor:
    """Per row: whether the published rule and ours are the same."""
    rows = x.reshape(len(x), -1)
    return (rows.amin(1) < 0) & (rows.amax(1) > 0) | (rows == 0).all(1)


@pytest.mark.parametrize("case", WEIGHT_CASES, ids=lambda case: case["key"])
def test_weights(case):
    key, bits = case["key"], case["bits"]
    w = tensor(WEIGHTS[case["tensor"]])
    delta, zero = weight_parameters(w, bits, case["method"])
    y = ((w / delta).round() + zero).clamp(0, 2**bits - 1).sub(zero) * delta
    rows = both_signs(w)
    assert rows.any()
    for name, found in (("delta", delta), ("zero", zero), ("y", y)):
        expected = tensor(WEIGHTS[f"{key}.{name}"])
        tolerance = {"delta": (1e-5, 1e-9), "zero": (0, 0), "y": (0, 1e-5)}[name]
        torch.testing.assert_close(found[rows], expected[rows], rtol=tolerance[0], atol=tolerance[1])
        if f"{key}.fixed_{name}" in WEIGHTS:
            fixed = tensor(WEIGHTS[f"{key}.fixed_{name}"]).reshape(found.shape).float()
            torch.testing.assert_close(found, fixed, rtol=1e-5, atol=tolerance[1])


@pytest.mark.parametrize("case", ACTIVATION_CASES, ids=lambda case: case["key"])
def test_activations(case):
    key, bits, symmetric = case["key"], case["bits"], case["symmetric"]
    x = tensor(ACTIVATIONS[case["tensor"]])
    fixed = "fixed_" if f"{key}.fixed_delta" in ACTIVATIONS else ""
    if case["method"] == "mse" and not ((x < 0).any() and (x > 0).any()):
        pytest.skip("the published search loses tensors of one sign")
    delta, zero = tensor_parameters(x, bits, symmetric=symmetric, method=case["method"])
    step = Step(delta, zero, bits, symmetric)
    np.testing.assert_allclose(float(delta), ACTIVATIONS[f"{key}.{fixed}delta"], rtol=1e-5)
    assert float(zero) == float(ACTIVATIONS[f"{key}.{fixed}zero"])
    np.testing.assert_allclose(step(x), ACTIVATIONS[f"{key}.{fixed}y"], atol=1e-5)


@pytest.mark.parametrize("name", ["sym", "asym"])
def test_gradients(name):
    x, w = (tensor(ACTIVATIONS[f"grad.{name}.{part}"]) for part in "xw")
    delta, zero = (tensor(ACTIVATIONS[f"grad.{name}.{part}"]).float() for part in ("delta", "zero"))
    y = ACTIVATIONS[f"grad.{name}.y"]
    for bits in range(2, 9):  # the width is not in the file: the one that gives these numbers
        step = Step(delta, zero, bits, name == "sym")
        if np.allclose(step(x), y, atol=1e-5):
            break
    else:
        raise AssertionError("no width gives the stored outputs")
    x.requires_grad_()
    learned = LearnedStep(step)
    (learned(x) * w).sum().backward()
    assert x.grad is not None and learned.delta.grad is not None
    np.testing.assert_allclose(x.grad, ACTIVATIONS[f"grad.{name}.dx"], atol=1e-4)
    np.testing.assert_allclose(learned.delta.grad, ACTIVATIONS[f"grad.{name}.ddelta"], atol=1e-4)


@pytest.mark.parametrize("name", ["sym", "asym"])
def test_running_range(name):
    xs = tensor(ACTIVATIONS[f"running.{name}.xs"])
    deltas, zeros = ACTIVATIONS[f"running.{name}.delta"], ACTIVATIONS[f"running.{name}.zero"]
    for bits in range(2, 9):
        observer, found = RangeObserver(bits, None, 0.05, symmetric=name == "sym"), []
        for x in xs:
            observer.update(x.reshape(1, -1))
            found.append(observer.parameters())
        if np.allclose([float(p.scale) for p in found[1:]], deltas, rtol=1e-5):
            assert [float(p.zero) for p in found[1:]] == list(zeros)
            return
    raise AssertionError("no width gives the stored steps")


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 16), st.booleans(), st.integers(0, 2**31), st.sampled_from([1e-6, 1.0, 1e4]))
def test_step_is_the_formula(bits, symmetric, seed, scale):
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(seed)) * scale
    delta, zero = tensor_parameters(x, bits, symmetric=symmetric)
    step = Step(delta, zero, bits, symmetric)
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)
    codes = ((x / delta).round() + zero).clamp(low, high)
    assert torch.equal(step(x), (codes - zero) * delta)
    assert torch.equal(step.codes(x), codes)
    assert ((step(x) - x).abs() <= delta * 0.5001 + (zero == zero) * delta * 0.5).all()
    assert torch.equal(LearnedStep(step)(x), step(x))


@pytest.mark.parametrize("symmetric", [True, False])
def test_nothing_but_zeros(symmetric):
    x = torch.zeros(2, 3)
    delta, zero = tensor_parameters(x, 8, symmetric=symmetric)
    assert float(delta) == pytest.approx(1e-8) and torch.equal(Step(delta, zero, 8, symmetric)(x), x)
    delta, zero = weight_parameters(torch.tensor([[0.0, 0.0], [1.0, -1.0]]), 4)
    assert float(delta[0]) == pytest.approx(1e-8) and float(zero[0]) == 0


def test_known_ranges_give_the_same_as_the_values():
    x = torch.randn(100)
    for symmetric in (True, False):
        assert range_parameters(x.min(), x.max(), 6, symmetric=symmetric) == tensor_parameters(
            x, 6, symmetric=symmetric
        )


def test_not_a_number_stays_visible():
    step = Step(torch.tensor(0.1), torch.tensor(3.0), 4, symmetric=False)
    assert step(torch.tensor([float("nan"), 1.0])).isnan().tolist() == [True, False]


def test_half_precision_is_rounded_once():
    x = torch.randn(1000)
    step = Step(torch.tensor(0.03), torch.tensor(128.0), 8, symmetric=False)
    assert torch.equal(step(x.bfloat16()), step(x.bfloat16().float()).bfloat16())


def test_a_split_step_treats_its_parts_alone():
    x = torch.randn(2, 5, 3, 3)
    first, second = (Step(torch.tensor(d), torch.tensor(0.0), 4, symmetric=True) for d in (0.3, 0.01))
    y = SplitStep((first, second), 2)(x)
    assert torch.equal(y[:, :2], first(x[:, :2])) and torch.equal(y[:, 2:], second(x[:, 2:]))


def test_menu():
    assert check_menu([5, 8, 6]) == (8, 6, 5)
    for wrong in ([], [8, 8], [1], [17], [6.0], ["8"], [True]):
        with pytest.raises(InputError, match="bits"):
            check_menu(wrong)
