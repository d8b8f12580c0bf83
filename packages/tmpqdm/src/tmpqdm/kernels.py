"""The activation quantiser as one pass over memory on a GPU (Triton); elsewhere torch's own operations serve."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _kernel(x_ptr, y_ptr, delta_ptr, low_ptr, high_ptr, count, block: tl.constexpr):  # pragma: no cover - on a GPU
    offsets = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    mask = offsets < count
    delta, low, high = tl.load(delta_ptr), tl.load(low_ptr), tl.load(high_ptr)
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    ratio = tl.div_rn(x, delta + tl.zeros_like(x))
    # to nearest, ties to even: adding and subtracting 1.5 2^23 rounds what is below 2^22; codes are below 2^16
    codes = tl.where(ratio < low, low, tl.where(ratio > high, high, ratio))
    codes = (codes + 12582912.0) - 12582912.0
    tl.store(y_ptr + offsets, (codes * delta).to(y_ptr.dtype.element_ty), mask=mask)


def fake_quantise(x: Tensor, delta: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """clip(round(x / delta), low, high) delta of a tensor of any shape and layout; parameters stay on the device."""
    y = torch.empty_like(x)  # keeps the layout where that is dense
    if y.stride() != x.stride():
        x = x.contiguous()
        y = torch.empty_like(x)
    count = x.numel()
    if count:
        _kernel[(triton.cdiv(count, BLOCK),)](x, y, delta, low, high, count, block=BLOCK)  # pyright: ignore[reportArgumentType]
    return y
