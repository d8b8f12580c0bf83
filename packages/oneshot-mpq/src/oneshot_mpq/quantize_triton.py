"""The fake quantiser on a GPU: one kernel forward, one backward, each reading and writing every element once.

Imported only when a CUDA tensor arrives, or by a test under Triton's interpreter (TRITON_INTERPRET=1). Bounds are
arguments of the kernels, not constants, so that other bits compile nothing again.
"""

# pyright: reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false
# Triton compiles this text itself; to Python its blocks and constants have other types.
import contextlib
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from oneshot_mpq.quantize import flat

AVAILABLE = False
with contextlib.suppress(ImportError):
    import triton
    import triton.language as tl

    AVAILABLE = True

BLOCK = 4096

if AVAILABLE:
    ROUND = tl.constexpr(12582912.0)
    """1.5 2^23: adding and subtracting it rounds to nearest, ties to even, below 2^22"""

    @triton.jit
    def _forward_kernel(x, y, step, low, high, count, SIZE: tl.constexpr):
        i = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
        here = i < count
        s = tl.load(step).to(tl.float32)
        value = tl.load(x + i, mask=here, other=0.0).to(tl.float32)
        v = tl.div_rn(value, tl.zeros_like(value) + s)
        # NaN falls through both comparisons and stays NaN
        c = tl.where(v < low, low, tl.where(v > high, high, v))
        k = (c + ROUND) - ROUND
        tl.store(y + i, (k * s).to(y.dtype.element_ty), mask=here)

    @triton.jit
    def _backward_kernel(x, upstream, step, of_input, sums, low, high, count, SIZE: tl.constexpr):
        i = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
        here = i < count
        s = tl.load(step).to(tl.float32)
        value = tl.load(x + i, mask=here, other=0.0).to(tl.float32)
        g = tl.load(upstream + i, mask=here, other=0.0).to(tl.float32)
        v = tl.div_rn(value, tl.zeros_like(value) + s)
        c = tl.where(v < low, low, tl.where(v > high, high, v))
        k = (c + ROUND) - ROUND
        inside = (v > low) & (v < high)
        tl.store(of_input + i, tl.where(inside, g, 0.0).to(of_input.dtype.element_ty), mask=here)
        tl.store(sums + tl.program_id(0), tl.sum(g * (k - tl.where(inside, v, 0.0)), 0))


class TritonLSQ(torch.autograd.Function):
    """One step for the whole tensor; float32 or half precision, computed in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, low: int, high: int, scale: float) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(x, step)
        ctx.low, ctx.high, ctx.scale = float(low), float(high), scale
        source, ctx.format = flat(x)
        y = torch.empty_like(x, memory_format=ctx.format)
        grid = (triton.cdiv(len(source), BLOCK),)
        _forward_kernel[grid](source, flat(y)[0], step, ctx.low, ctx.high, len(source), SIZE=BLOCK)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, step = ctx.saved_tensors
        source, g = flat(x)[0], flat(upstream.contiguous(memory_format=ctx.format))[0]
        of_input = torch.empty_like(x, memory_format=ctx.format)
        blocks = triton.cdiv(len(source), BLOCK)
        sums = torch.empty(blocks, dtype=torch.float32, device=x.device)
        target = flat(of_input)[0]
        _backward_kernel[(blocks,)](source, g, step, target, sums, ctx.low, ctx.high, len(source), SIZE=BLOCK)
        of_step = None
        if ctx.needs_input_grad[1]:
            of_step = (sums.double().sum() * ctx.scale).reshape(step.shape).to(step.dtype)
        return of_input if ctx.needs_input_grad[0] else None, of_step, None, None, None
