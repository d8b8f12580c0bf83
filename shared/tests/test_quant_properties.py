"""What must hold for any input: error bounds, idempotence, independence of the batch, edge shapes, bad arguments."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from papercore.errors import InputError
from papercore.quant import (
    RangeObserver,
    choose_parameters,
    fake_quantize,
    group_dequantize,
    group_quantize,
    layer_cost,
    pack_codes,
    unpack_codes,
)

bits = st.integers(2, 8)
booleans = st.booleans()


@st.composite
def arrays(draw):
    """A matrix with rows of very different size, and a group size that need not divide its columns."""
    rows, columns = draw(st.integers(1, 6)), draw(st.integers(1, 40))
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator) * 10 ** torch.randint(-4, 5, (rows, 1), generator=generator)
    if draw(booleans):
        x = x.abs() * draw(st.sampled_from([-1, 1]))
    if draw(booleans):
        x[torch.rand(x.shape, generator=generator) < 0.3] = 0
    return x, draw(st.one_of(st.none(), st.integers(1, columns)))


@given(arrays(), bits, booleans)
@settings(deadline=None, max_examples=200)
def test_error_is_at_most_half_a_step(case, b, symmetric):
    x, group = case
    codes, scale, zero = group_quantize(x, b, group, symmetric=symmetric)
    size = group or x.shape[1]
    step = scale.repeat_interleave(size, -1)[:, : x.shape[1]]
    # the asymmetric zero point is rounded, so the ends of the range may lie half a step outside the grid
    slack = 1e-5 * (x.abs() + step)
    limit = step * (0.5 if symmetric else 1.0) + slack
    error = (group_dequantize(codes, scale, zero, group) - x).abs()
    assert (error <= limit).all()
    low, high = (-(2 ** (b - 1)), 2 ** (b - 1) - 1) if symmetric else (0, 2**b - 1)
    inside = (codes > low) & (codes < high)
    assert (error[inside] <= (0.5 * step + slack)[inside]).all()
    assert int(codes.min()) >= low
    assert int(codes.max()) <= high


@given(arrays(), bits, booleans)
@settings(deadline=None, max_examples=200)
def test_quantising_again_with_the_same_parameters_changes_nothing(case, b, symmetric):
    from papercore.quant import Parameters, quantize

    x, group = case
    codes, scale, zero = group_quantize(x, b, group, symmetric=symmetric)
    values = group_dequantize(codes, scale, zero, group)
    again = quantize(values, Parameters(scale, zero), b, group, symmetric=symmetric)
    assert torch.equal(again, codes)


@given(arrays(), bits, booleans)
@settings(deadline=None, max_examples=100)
def test_rows_do_not_depend_on_the_batch(case, b, symmetric):
    x, group = case
    whole = group_quantize(x, b, group, symmetric=symmetric)
    for i in range(len(x)):
        for together, alone in zip(whole, group_quantize(x[i : i + 1], b, group, symmetric=symmetric), strict=True):
            assert torch.equal(together[i : i + 1], alone)


@given(arrays(), bits, booleans)
@settings(deadline=None, max_examples=100)
def test_zeros_stay_exactly_zero(case, b, symmetric):
    x, group = case
    assert (fake_quantize(x, b, group, symmetric=symmetric)[x == 0] == 0).all()


@given(arrays(), bits)
@settings(deadline=None, max_examples=60)
def test_the_search_is_never_worse_than_the_whole_range(case, b):
    x, group = case
    size = group or x.shape[1]
    padded = torch.nn.functional.pad(x, (0, -x.shape[1] % size))

    def score(method):
        values = torch.nn.functional.pad(fake_quantize(x, b, group, method=method), (0, -x.shape[1] % size))
        return (padded - values).abs().pow(2.4).unflatten(-1, (-1, size)).sum(-1)

    assert (score("mse") <= score("max") * (1 + 1e-5)).all()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("shape", [(0, 4), (3, 1), (1, 1), (2, 0, 5), (2, 3, 7)])
def test_shapes(shape, symmetric):
    x = torch.randn(shape)
    codes, scale, zero = group_quantize(x, 4, None, symmetric=symmetric)
    assert codes.shape == x.shape
    assert scale.shape == zero.shape == (*x.shape[:-1], 1)
    assert fake_quantize(x, 4, None, symmetric=symmetric).shape == x.shape


def test_single_element_groups_are_kept_to_half_a_step():
    x = torch.tensor([[3.0, -2.0, 0.0, 1e-9]])
    values = fake_quantize(x, 8, 1)
    torch.testing.assert_close(values, x, rtol=1e-6, atol=1e-5)


def test_types_are_kept_and_computed_in_float32():
    x = torch.randn(4, 64)
    for dtype in (torch.float16, torch.bfloat16):
        y = fake_quantize(x.to(dtype), 8, 32)
        assert y.dtype == dtype
        assert torch.equal(y, fake_quantize(x.to(dtype).float(), 8, 32).to(dtype))


def test_float16_does_not_overflow():
    x = torch.tensor([[65504.0, -65504, 2, 3]]).half()
    assert torch.isfinite(fake_quantize(x, 8, None)).all()


def test_half_precision_scales_are_what_was_used():
    x = torch.randn(8, 64) * torch.logspace(-12, 2, 8)[:, None]
    scale = choose_parameters(x, 4, 32, scale_dtype=torch.float16).scale
    assert torch.equal(scale.half().float(), scale)
    assert (scale > 0).all()


def test_not_a_number_stays_in_its_group():
    x = torch.ones(2, 8)
    x[0, 1] = torch.nan
    y = fake_quantize(x, 8, 4)
    assert y[0, :4].isnan().all()
    assert not y[0, 4:].isnan().any()
    assert not y[1].isnan().any()


def test_gradient_is_straight_through_inside_and_zero_where_clipped():
    x = torch.tensor([[-4.0, -0.3, 0.2, 1.0]], requires_grad=True)
    fake_quantize(x, 4, None, clip_ratio=0.5).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[0.0, 1.0, 1.0, 0.0]]


@given(arrays(), bits, booleans)
@settings(deadline=None, max_examples=200)
def test_packing_is_lossless(case, b, symmetric):
    codes = group_quantize(case[0], b, None, symmetric=symmetric)[0]
    packed = pack_codes(codes, b)
    assert packed.shape[-1] == -(-codes.shape[-1] * b // 8)
    assert torch.equal(unpack_codes(packed, b, codes.shape[-1], signed=symmetric), codes)


def test_packing_is_a_little_endian_bit_stream():
    codes = torch.randint(0, 8, (3, 11), generator=torch.Generator().manual_seed(0))
    for row, packed in zip(codes.tolist(), pack_codes(codes, 3).tolist(), strict=True):
        stream = sum(code << (3 * k) for k, code in enumerate(row))
        assert packed == list(stream.to_bytes(5, "little"))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: fake_quantize(torch.ones(2, 4), 1, None), ("bits", "found 1")),
        (lambda: fake_quantize(torch.ones(2, 4), 4, 5), ("group size", "found 5", "4 columns")),
        (lambda: fake_quantize(torch.ones(2, 4), 4, -1), ("group size", "found -1")),
        (lambda: fake_quantize(torch.ones(2, 4), 4, 2.0), ("group size", "found 2.0")),
        (lambda: choose_parameters(torch.ones(2, 4), 4, method="best"), ("range method", "best")),
        (lambda: choose_parameters(torch.ones(2, 4), 4, clip_ratio=0.0), ("clip ratio", "found 0.0")),
        (lambda: pack_codes(torch.tensor([16]), 4), ("codes", "found 16..16", "4 bits")),
        (lambda: unpack_codes(torch.zeros(1, 2, dtype=torch.uint8), 4, 5), ("packed row", "found 2 bytes", "3")),
        (lambda: pack_codes(torch.tensor([-8, 15]), 4), ("codes", "found -8..15")),
        (lambda: pack_codes(torch.tensor([1.5]), 4), ("codes", "float32")),
        (lambda: layer_cost(2, 4, 9, None), ("bits", "found 9")),
        (lambda: layer_cost(0, 4, 4, None), ("rows", "found 0")),
        (lambda: RangeObserver(99, None), ("bits", "found 99")),
        (lambda: RangeObserver(8, -4), ("group size", "found -4")),
        (lambda: RangeObserver(8, None).update(torch.full((1, 2), torch.nan)), ("not finite",)),
        (
            lambda: choose_parameters(torch.full((1, 2), 1e7), 4, scale_dtype=torch.float16),
            ("scale", "above 65504", "float32"),
        ),
        (lambda: RangeObserver(8, None).parameters(), ("no calibration batch",)),
        (lambda: RangeObserver(8, None, momentum=0), ("momentum", "found 0")),
    ],
)
def test_bad_arguments_are_named(call, words):
    with pytest.raises(InputError) as caught:
        call()
    for word in words:
        assert word in str(caught.value)
