"""The quantiser with one step for every bit-width."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oneshot_mpq import LSQ
from oneshot_mpq.lsq import FLOAT, STEP_FLOOR


@pytest.mark.parametrize("bits", [(), (2, 2), (1, 2), (9,), (0,), (-3,), (True, 2), (2.5,), ("4",), (16,)])
def test_bits_that_do_not_exist_are_named(bits):
    with pytest.raises(ValueError, match="bits"):
        LSQ(bits)


def test_ranges():
    signed, unsigned, symmetric = LSQ((2, 4, 8)), LSQ((2, 4, 8), False), LSQ((2, 4), symmetric=True)
    assert [(signed.low(b), signed.high(b)) for b in signed.bits] == [(-2, 1), (-8, 7), (-128, 127)]
    assert [(unsigned.low(b), unsigned.high(b)) for b in unsigned.bits] == [(0, 3), (0, 15), (0, 255)]
    assert (symmetric.low(2), symmetric.high(2)) == (-1, 1)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 8), st.booleans(), st.integers(0, 2**31 - 1), st.floats(0.01, 10))
def test_values_lie_on_the_grid_and_nearest(bits, signed, seed, spread):
    x = torch.randn(50, generator=torch.Generator().manual_seed(seed)) * spread
    quantizer = LSQ((bits,), signed)
    quantizer.initialise_activation(x)
    step = quantizer.step(bits).detach()
    y, codes = quantizer(x, bits).detach(), quantizer.codes(x, bits)
    assert codes.dtype == torch.int32
    assert int(codes.min()) >= quantizer.low(bits) and int(codes.max()) <= quantizer.high(bits)
    torch.testing.assert_close(y, codes * step)
    grid = torch.arange(quantizer.low(bits), quantizer.high(bits) + 1) * step
    nearest = (x[:, None] - grid).abs().min(1).values
    torch.testing.assert_close((x - y).abs(), nearest, atol=1e-5 * spread, rtol=1e-4)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 8), st.booleans(), st.booleans(), st.integers(0, 2**31 - 1))
def test_gradients_against_the_formula_written_out(bits, signed, scaled, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(40, generator=generator, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(40, generator=generator, dtype=torch.float64)
    quantizer = LSQ((2, bits) if bits > 2 else (2, 3), signed, gradient_scaling=scaled, dtype=torch.float64)
    quantizer.initialise_activation(x)
    quantizer(x, bits).backward(upstream)
    low, high, step = quantizer.low(bits), quantizer.high(bits), quantizer.step(bits).item()
    inputs, total = [], 0.0
    for value, g in zip(x.tolist(), upstream.tolist(), strict=True):
        v = value / step
        inside = low < v < high
        inputs.append(g if inside else 0.0)
        total += g * ((round(v) - v) if inside else low if v <= low else high)
    total *= 1 / math.sqrt(high * 40) if scaled else 1
    torch.testing.assert_close(x.grad, torch.tensor(inputs, dtype=torch.float64))
    gradients = dict(zip(quantizer.bits, quantizer.steps.grad.tolist(), strict=True))
    assert gradients.pop(bits) == pytest.approx(total, abs=1e-9)
    assert set(gradients.values()) <= {0.0}


def test_thirty_two_bits_leave_the_tensor_as_it_is():
    x = torch.randn(5)
    assert LSQ((FLOAT,))(x, FLOAT) is x
    assert not LSQ((FLOAT,)).steps.requires_grad


def test_a_step_for_every_channel():
    weight = torch.randn(4, 3, 3, 3) * torch.tensor([0.01, 0.1, 1, 10])[:, None, None, None]
    quantizer = LSQ((2, 8), channels=4)
    quantizer.initialise_weight(weight)
    alone = LSQ((2, 8))
    for channel in range(4):
        alone.initialise_weight(weight[channel])
        torch.testing.assert_close(quantizer.steps[:, channel], alone.steps)
        torch.testing.assert_close(quantizer(weight, 8)[channel], alone(weight[channel], 8))


def test_all_zero_activations_give_the_smallest_step_and_a_warning():
    quantizer = LSQ((2, 4), False)
    with pytest.warns(UserWarning, match="all values are zero"):
        y = quantizer(torch.zeros(8), 2)
    assert torch.equal(y, torch.zeros(8))
    assert (quantizer.steps == STEP_FLOOR).all() and quantizer.ready


def test_steps_are_set_at_first_use_and_kept_in_a_checkpoint():
    quantizer = LSQ((2, 4), False)
    assert not quantizer.ready
    quantizer(torch.ones(8), 4)
    assert quantizer.step(2).item() == pytest.approx(2 / math.sqrt(3))
    other = LSQ((2, 4), True)
    other.load_state_dict(quantizer.state_dict())
    assert other.ready and not other.signed
    before = other.steps.clone()
    other(torch.full((8,), 9.0), 2)
    assert torch.equal(before, other.steps)


def test_values_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="NaN or infinity"):
        LSQ((2, 4)).initialise_weight(torch.tensor([[1.0, float("nan")]]))
    with pytest.raises(ValueError, match="expected one of"):
        LSQ((2, 4)).step(3)
