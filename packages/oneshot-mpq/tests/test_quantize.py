"""Fake quantisation against the authors' code (golden/README.md)."""

import pytest
import torch
from oneshot_mpq import lsq_fake_quantize

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
