"""Fake quantisation with a learned step (LSQ, arXiv 1902.08153; specification of the method, 2.1)."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def _codes(x: Tensor, step: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """Position x / s on the grid and the integer code, at least in float32.

    Divided, not multiplied with 1 / s: the codes of ties would differ.
    """
    position = (x.float() if x.dtype in (torch.float16, torch.bfloat16) else x) / step
    return position, position.clamp(low, high).round_()


class _LSQ(torch.autograd.Function):
    """The backward pass computes the codes again instead of keeping them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, low: int, high: int, scale: float) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(x, step)
        ctx.low, ctx.high, ctx.scale = low, high, scale
        _, codes = _codes(x, step, low, high)
        return codes.mul_(step).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, step = ctx.saved_tensors
        position, codes = _codes(x, step, ctx.low, ctx.high)
        inside = (position > ctx.low) & (position < ctx.high)
        of_input = upstream * inside if ctx.needs_input_grad[0] else None
        of_step = None
        if ctx.needs_input_grad[1]:
            # k - v inside; at and beyond the bounds the code is the bound itself
            codes -= position.mul_(inside)
            of_step = (codes.mul_(upstream).sum_to_size(step.shape) * ctx.scale).to(step.dtype)
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
    summed, times `gradient_scale`.

    Args:
        step: above 0; a scalar, or of a shape that spreads over `x`.
        low, high: smallest and largest code.
    """
    return _LSQ.apply(x, step, low, high, gradient_scale)  # pyright: ignore[reportReturnType]
