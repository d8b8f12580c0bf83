"""Fake quantisation against the authors' code (golden/README.md)."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oneshot_mpq import lsq_fake_quantize, quantize
from oneshot_mpq.lsq import code_range

from .conftest import golden

FILES = {name: golden(name) for name in ("lsq_a", "lsq_b")}
CASES = [pytest.param(case, FILES[n][1], id=f"{n}-{case['case']}") for n in FILES for case in FILES[n][0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("case", "arrays"), CASES)
def test_codes_outputs_and_gradients(case, arrays, dtype):
    x, upstream, codes, y, of_x = (
        torch.from_numpy(arrays[f"{case['case']}_{part}"]).to(dtype) for part in ("x", "g", "code", "y", "gx")
    )
    step = torch.tensor(case["s"], dtype=dtype, requires_grad=True)
    low, high = case["qmin"], case["qmax"]
    scale = (high * x.numel()) ** -0.5 if case["scale_grad"] else 1.0
    x.requires_grad_()
    found = lsq_fake_quantize(x, step, low, high, scale)
    found.backward(upstream)
    tolerance = {"rtol": 1e-6, "atol": 0} if dtype == torch.float32 else {"rtol": 1e-7, "atol": 0}
    assert torch.equal((found.detach() / step.detach()).round(), codes)
    torch.testing.assert_close(found.detach(), y, **tolerance)
    torch.testing.assert_close(x.grad, of_x, **tolerance)
    assert step.grad.item() == pytest.approx(case["gs"], rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gets_codes_of_float32(dtype):
    x = torch.randn(1000).to(dtype)
    step = torch.tensor(0.1, requires_grad=True)
    y = lsq_fake_quantize(x, step, -8, 7)
    expected = (x.float() / step.detach()).clamp(-8, 7).round() * step.detach()
    assert y.dtype == dtype and torch.equal(y, expected.to(dtype))
    y.sum().backward()
    assert torch.isfinite(step.grad)


def test_a_step_for_every_row():
    x = torch.randn(4, 3, 3, 3, dtype=torch.float64)
    steps = torch.rand(4, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(x.shape, dtype=torch.float64)
    lsq_fake_quantize(x, steps[:, None, None, None], -2, 1).backward(upstream)
    for row in range(4):
        alone = steps[row].detach().clone().requires_grad_()
        lsq_fake_quantize(x[row], alone, -2, 1).backward(upstream[row])
        torch.testing.assert_close(steps.grad[row], alone.grad)


def compare_with_plain(x, step, low, high, **tolerance):
    """Outputs and gradients in pieces against the plain operations; the latter's step gradient is in float64."""
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(3)).to(x.dtype)
    found = []
    for function in (lsq_fake_quantize, quantize._PlainLSQ.apply):
        a, s = x.clone(memory_format=torch.preserve_format).requires_grad_(), step.clone().requires_grad_()
        y = function(a, s, low, high, 0.5)
        y.backward(upstream)
        found.append((y.detach(), a.grad, s.grad))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    torch.testing.assert_close(found[0][2], found[1][2], **tolerance)


@given(
    size=st.integers(1, 700),
    bits=st.integers(2, 8),
    signed=st.booleans(),
    seed=st.integers(0, 1000),
    piece=st.sampled_from([1, 7, 64, 65536]),
)
@settings(max_examples=60, deadline=None)
def test_pieces_give_what_whole_tensors_give(size, bits, signed, seed, piece):
    x = torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    low, high = code_range(bits, signed)
    x[: min(size, 3)] = torch.tensor([low * 0.25, high * 0.25, 0.125], dtype=torch.float64)[: min(size, 3)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantize, "PIECE", piece)
        compare_with_plain(x, torch.tensor(0.25, dtype=torch.float64), low, high, rtol=1e-9, atol=1e-9)


def test_formats_rows_and_strides():
    x = torch.randn(4, 6, 5, 5, dtype=torch.float64)
    scalar, rows = torch.tensor(0.3, dtype=torch.float64), torch.rand(4, 1, 1, 1, dtype=torch.float64) + 0.1
    for step in (scalar, scalar.reshape(1), rows):
        for layout in (x, x.contiguous(memory_format=torch.channels_last), x.transpose(2, 3)):
            compare_with_plain(layout, step, -4, 3, rtol=1e-9, atol=1e-9)
    y = lsq_fake_quantize(x.contiguous(memory_format=torch.channels_last), scalar, -4, 3)
    assert y.is_contiguous(memory_format=torch.channels_last)
    columns = torch.rand(6, 1, 1, dtype=torch.float64) + 0.1  # spreads over the second dimension: the plain path
    compare_with_plain(x, columns, -4, 3, rtol=1e-12, atol=1e-12)


def test_nan_stays_and_nothing_is_empty():
    step = torch.tensor(0.5, requires_grad=True)
    assert lsq_fake_quantize(torch.tensor([float("nan"), 1.0]), step, -4, 3).isnan().tolist() == [True, False]
    empty = lsq_fake_quantize(torch.zeros(0, 3), step, -4, 3)
    empty.sum().backward()
    assert empty.shape == (0, 3) and step.grad == 0


def test_a_second_derivative_is_refused():
    x, step = torch.randn(5, requires_grad=True), torch.tensor(0.5, requires_grad=True)
    (slope,) = torch.autograd.grad(lsq_fake_quantize(x, step, -4, 3).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


def test_threads_do_not_disturb_one_another():
    tensors = [torch.randn(300_000, generator=torch.Generator().manual_seed(i)) for i in range(4)]

    def gradient(x):
        step = torch.tensor(0.1, requires_grad=True)
        lsq_fake_quantize(x, step, -8, 7).backward(x)
        return step.grad

    expected = [gradient(x) for x in tensors]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(gradient, tensors * 4)) == expected * 4


def test_triton_kernels_in_the_interpreter():
    """In a process of its own: Triton decides when it is imported whether it interprets."""
    pytest.importorskip("triton")
    script = Path(__file__).with_name("quantiser_in_interpreter.py")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "all equal" in done.stdout
