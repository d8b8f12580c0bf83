"""Uniform quantisers with fixed ranges: weights for every output channel, activations for a whole tensor.

Asymmetric, b bits, codes 0..2^b-1:  q = clip(round(x / d) + z, 0, 2^b - 1),  x' = (q - z) d.
Symmetric, codes -2^(b-1)..2^(b-1)-1:  z = 0,  d = max|x| / (2^(b-1) - 1).

Ranges always contain 0, z is always a legal code, d is at least 1e-8, and x / d is a float32 division rounded half to
even. The rules are `papercore.quant`'s; here are the settings of TMPQ-DM (arXiv 2404.09532; a step of a tensor that has
one sign differs from its code on purpose) and the operation that runs once for every activation of every forward pass.
"""

from typing import Any, Literal

import torch
from jaxtyping import Float
from papercore.errors import InputError
from papercore.quant.affine import choose_parameters, code_range, parameters_of_range
from torch import Tensor

SMALLEST_STEP = 1e-8

SHRINKS = (80, 0.01)
"""the search for the best range tries it shrunk by 1 - 0.01 i, i = 0..79"""

Method = Literal["max", "mse"]


def check_menu(bits: Any) -> tuple[int, ...]:
    """The bit-widths, sorted from most to least.

    Raises:
        InputError: empty, repeated, or not whole numbers from 2 to 16.
    """
    menu = tuple(bits)
    for value in menu:
        code_range(value, symmetric=False)
    if not menu or len(set(menu)) != len(menu):
        raise InputError("bits", found=list(menu), expected="different whole numbers from 2 to 16")
    return tuple(sorted(menu, reverse=True))


def weight_parameters(
    weight: Float[Tensor, "out *rest"], bits: int, method: Method = "max"
) -> tuple[Float[Tensor, "out *ones"], Float[Tensor, "out *ones"]]:
    """Step and zero point of every output channel, asymmetric, shaped to broadcast against the weight."""
    found = choose_parameters(
        weight.reshape(len(weight), -1), bits, method=method, shrinks=SHRINKS, floor=_floor(bits, False)
    )
    shape = (len(weight), *[1] * (weight.ndim - 1))
    return found.scale.reshape(shape), found.zero.reshape(shape)


def tensor_parameters(
    x: Float[Tensor, "*shape"], bits: int, *, symmetric: bool, method: Method = "max"
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Step and zero point of a whole tensor. "mse" minimises the mean of |x - x'|^2.4 over the shrunk ranges."""
    found = choose_parameters(
        x.reshape(1, -1), bits, symmetric=symmetric, method=method, shrinks=SHRINKS, floor=_floor(bits, symmetric)
    )
    return found.scale.reshape(()), found.zero.reshape(())


def range_parameters(
    low: Float[Tensor, "*n"], high: Float[Tensor, "*n"], bits: int, *, symmetric: bool
) -> tuple[Float[Tensor, "*n"], Float[Tensor, "*n"]]:
    """Step and zero point for known smallest and largest values."""
    low, high = low.float().clamp(max=0), high.float().clamp(min=0)
    if symmetric:
        low, high = torch.zeros_like(high), torch.maximum(-low, high)
    return parameters_of_range(low, high, bits, symmetric=symmetric, floor=_floor(bits, symmetric))


class Step:
    """One fixed activation quantiser of a tensor. Calling it quantises and dequantises.

    The bounds are those of round(x / d), that is of the code without its zero point, so that the zero point costs
    nothing: (clip(r + z, lo, hi) - z) d = clip(r, lo - z, hi - z) d, exactly, for whole numbers.
    """

    __slots__ = ("bits", "delta", "hi", "high", "lo", "low", "symmetric", "zero")

    def __init__(self, delta: Tensor, zero: Tensor, bits: int, symmetric: bool) -> None:
        lo, hi = code_range(bits, symmetric)
        self.bits, self.symmetric = bits, symmetric
        self.delta, self.zero = delta.detach().float().reshape(()), zero.detach().float().reshape(())
        self.lo, self.hi = lo - float(self.zero), hi - float(self.zero)
        self.low, self.high = (torch.tensor(v, device=delta.device) for v in (self.lo, self.hi))

    def __call__(self, x: Tensor) -> Tensor:
        if x.is_cuda or torch.compiler.is_compiling():
            return _on_device(x, self.delta, self.low, self.high)
        # In place: one new tensor. A 0-dimensional step keeps the division a division of float32 numbers, and plain
        # numbers as bounds are four times as fast as tensors.
        if x.dtype is not torch.float32:
            wide = x.float()
            return wide.div_(self.delta).round_().clamp_(self.lo, self.hi).mul_(self.delta).to(x.dtype)
        return torch.div(x, self.delta).round_().clamp_(self.lo, self.hi).mul_(self.delta)

    def to(self, device: torch.device) -> "Step":
        return self if self.delta.device == device else Step(self.delta.to(device), self.zero.to(device), self.bits,
                                                             self.symmetric)  # fmt: skip

    def codes(self, x: Tensor) -> Tensor:
        """The whole numbers q, with the zero point."""
        return (x.float() / self.delta).round().clamp(self.lo, self.hi) + self.zero


class SplitStep:
    """Two quantisers for the channels before and after a point (dimension 1), for a concatenation of two tensors."""

    __slots__ = ("at", "halves")

    def __init__(self, halves: tuple[Any, Any], at: int) -> None:
        self.halves, self.at = halves, at

    def __call__(self, x: Tensor) -> Tensor:
        return torch.cat([self.halves[0](x[:, : self.at]), self.halves[1](x[:, self.at :])], 1)

    def to(self, device: torch.device) -> "SplitStep":
        return SplitStep((self.halves[0].to(device), self.halves[1].to(device)), self.at)


class LearnedStep:
    """A quantiser whose step is being learned; gradients as in `StepGradient`."""

    def __init__(self, step: Step) -> None:
        self.start = step
        self.delta = step.delta.clone().requires_grad_()

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = StepGradient.apply(x, self.delta, self.start.lo, self.start.hi)  # pyright: ignore[reportAssignmentType]
        return y

    def result(self) -> Step:
        return Step(self.delta.detach().clone(), self.start.zero, self.start.bits, self.start.symmetric)


class StepGradient(torch.autograd.Function):
    """clip(round(x / d), lo, hi) d, and its gradients: straight through to x between the two end codes; to d
    round(x/d) - x/d there and the code at an end (arXiv 1902.08153, section 2.1).

    A value that rounds to an end code counts as clipped whether it lies beyond it or not, as in the golden numbers.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: Tensor, lo: float, hi: float) -> Tensor:
        ratio = x.float() / delta
        codes = ratio.round()
        inside = (codes > lo) & (codes < hi)
        codes = codes.clamp_(lo, hi)
        ctx.save_for_backward(torch.where(inside, codes - ratio, codes), inside)
        return codes.mul_(delta).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        slope, inside = ctx.saved_tensors
        (gradient,) = gradients
        return gradient * inside, (gradient * slope).sum(), None, None


def _on_device(x: Tensor, delta: Tensor, low: Tensor, high: Tensor) -> Tensor:
    if x.is_cuda and not torch.compiler.is_compiling() and not x.requires_grad:
        from tmpqdm.kernels import fake_quantise

        return fake_quantise(x, delta, low, high)
    codes = torch.minimum(torch.maximum((x.float() / delta).round(), low), high)
    return (codes * delta).to(x.dtype)


def _floor(bits: int, symmetric: bool) -> float:
    smallest, largest = code_range(bits, symmetric)
    return SMALLEST_STEP * (largest if symmetric else largest - smallest)
