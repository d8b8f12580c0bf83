"""Fake quantisation with a learned step (LSQ, arXiv 1902.08153; specification of the method, 2.1).

On a CPU the work goes through the tensor in pieces that stay in the cache: what would be a dozen passes over memory
becomes one. Nothing is compiled, so nothing is compiled again for other bits or shapes. On a GPU it is a pair of Triton
kernels; anything else (other steps, other devices, inside `torch.compile`) takes the plain path.
"""

import threading
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

PIECE = 262_144
"""elements a thread works on at a time; measured: smaller ones pay more for calls than a nearer cache gives back"""
HALF = (torch.float16, torch.bfloat16)
_SCRATCH = threading.local()


def scratch(size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Three buffers of a piece, kept by each thread: fresh memory would cost more than the arithmetic."""
    kept: dict[torch.dtype, Tensor] = _SCRATCH.__dict__.setdefault("buffers", {})
    if dtype not in kept or kept[dtype].shape[1] < size:
        kept[dtype] = torch.empty(3, size, dtype=dtype)
    a, b, c = kept[dtype][:, :size]
    return a, b, c


def flat(x: Float[Tensor, "*shape"]) -> tuple[Float[Tensor, " n"], torch.memory_format]:
    """The elements as they lie in memory, without a copy where possible, and the format they lie in."""
    if not x.is_contiguous() and x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return x.permute(0, 2, 3, 1).reshape(-1), torch.channels_last
    return x.reshape(-1), torch.contiguous_format


def rows_of(x: Float[Tensor, "*shape"], step: Float[Tensor, "*step"]) -> int | None:
    """How many rows of their own steps `x` has: 1 for a scalar; nothing when the step spreads in another way."""
    if step.numel() == 1:
        return 1
    row_wise = x.ndim > 0 and step.ndim == x.ndim and step.shape[0] == x.shape[0] == step.numel()
    return len(x) if row_wise else None


def _pieces(size: int) -> range:
    return range(0, size, PIECE * torch.get_num_threads())


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in HALF else x


def _forward(x: Float[Tensor, " n"], step: Float[Tensor, ""], low: int, high: int, out: Float[Tensor, " n"]) -> None:
    width = PIECE * torch.get_num_threads()
    for start in _pieces(len(x)):
        here, to = x[start : start + width], out[start : start + width]
        if x.dtype in HALF:
            to.copy_((here.float() / step).clamp_(low, high).round_().mul_(step))
        else:
            # divided, not multiplied with 1 / s: the codes of ties would differ
            torch.div(here, step, out=to).clamp_(low, high).round_().mul_(step)


def _backward(
    x: Float[Tensor, " n"],
    step: Float[Tensor, ""],
    upstream: Float[Tensor, " n"],
    low: int,
    high: int,
    of_input: Float[Tensor, " n"] | None,
    wants_step: bool,
) -> Float[Tensor, ""]:
    """Writes the gradient of `x`, gives that of the step; the codes are computed again.

    With c = clamp(v), the sum over k - v inside and k outside is g (k - c) + (g - gx) k: k - c is 0 outside, g - gx is
    0 inside. Sums of a piece in its precision, their sum in float64.
    """
    width = PIECE * torch.get_num_threads()
    wide = torch.float32 if x.dtype in HALF else x.dtype
    position, codes, rest = scratch(min(width, len(x)), wide)
    sums = torch.zeros(2, max(1, len(_pieces(len(x)))), dtype=wide)
    for i, start in enumerate(_pieces(len(x))):
        here, g = x[start : start + width], _wide(upstream[start : start + width])
        v, k, r = (buffer[: len(here)] for buffer in (position, codes, rest))
        torch.div(_wide(here), step, out=v)
        # the upstream where low < v < high, else 0
        gx = torch.ops.aten.hardtanh_backward.default(g, v, low, high) if x.dtype in HALF or of_input is None else None
        if gx is None:
            assert of_input is not None
            gx = of_input[start : start + width]
            torch.ops.aten.hardtanh_backward.grad_input(g, v, low, high, grad_input=gx)
        elif of_input is not None:
            of_input[start : start + width] = gx
        if wants_step:
            torch.round(v.clamp_(low, high), out=k)
            torch.dot(torch.sub(g, gx, out=r), k, out=sums[0, i])
            torch.dot(k.sub_(v), g, out=sums[1, i])
    return sums.double().sum()


class _LSQ(torch.autograd.Function):
    """In pieces on the CPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, low: int, high: int, scale: float) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(x, step)
        ctx.low, ctx.high, ctx.scale = low, high, scale
        source, ctx.format = flat(x)
        out = torch.empty_like(x, memory_format=ctx.format)
        target = flat(out)[0]
        steps = step.to(torch.float32 if x.dtype in HALF else x.dtype).reshape(-1)
        for row, (a, b) in enumerate(zip(source.chunk(len(steps)), target.chunk(len(steps)), strict=True)):
            _forward(a, steps[row], low, high, b)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, step = ctx.saved_tensors
        wants_input, wants_step = ctx.needs_input_grad[:2]
        source, g = flat(x)[0], flat(upstream.contiguous(memory_format=ctx.format))[0]
        of_input = torch.empty_like(x, memory_format=ctx.format) if wants_input else None
        steps = step.to(torch.float32 if x.dtype in HALF else x.dtype).reshape(-1)
        count = len(steps)
        targets = [None] * count if of_input is None else flat(of_input)[0].chunk(count)
        sums = [
            _backward(a, steps[row], b, ctx.low, ctx.high, target, wants_step)
            for row, (a, b, target) in enumerate(zip(source.chunk(count), g.chunk(count), targets, strict=True))
        ]
        of_step = (torch.stack(sums) * ctx.scale).reshape(step.shape).to(step.dtype) if wants_step else None
        return of_input, of_step, None, None, None


class _PlainLSQ(torch.autograd.Function):
    """Operation by operation, on any device, for any step that spreads over `x`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, low: int, high: int, scale: float) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(x, step)
        ctx.low, ctx.high, ctx.scale = low, high, scale
        return (_wide(x) / step).clamp(low, high).round().mul(step).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, step = ctx.saved_tensors
        position = _wide(x) / step
        inside = (position > ctx.low) & (position < ctx.high)
        of_input = upstream * inside if ctx.needs_input_grad[0] else None
        of_step = None
        if ctx.needs_input_grad[1]:
            # k - v inside; at and beyond the bounds the code is the bound itself
            change = position.clamp(ctx.low, ctx.high).round() - torch.where(inside, position, 0)
            of_step = ((change * upstream).sum_to_size(step.shape) * ctx.scale).to(step.dtype)
        return of_input, of_step, None, None, None


def lsq_fake_quantize(
    x: Float[Tensor, "*shape"],
    step: Float[Tensor, "*step"],
    low: int,
    high: int,
    gradient_scale: float = 1.0,
) -> Float[Tensor, "*shape"]:
    """round_half_even(clamp(x / s, low, high)) s.

    The gradient of x is passed on where low < x / s < high; that of s is k - x / s there, low below and high above,
    summed, times `gradient_scale`. Half precision is computed in float32.

    Args:
        step: above 0; a scalar, or of a shape that spreads over `x`.
        low, high: smallest and largest code.
    """
    function: Any = _PlainLSQ
    if not torch.compiler.is_compiling() and x.numel() and rows_of(x, step) is not None:
        if x.device.type == "cpu":
            function = _LSQ
        elif x.device.type == "cuda" and rows_of(x, step) == 1 and x.dtype != torch.float64:
            from oneshot_mpq import quantize_triton

            if quantize_triton.AVAILABLE:
                function = quantize_triton.TritonLSQ
    return function.apply(x, step, low, high, gradient_scale)
