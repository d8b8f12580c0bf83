"""Learned step sizes, one for every candidate bit-width (LSQ, arXiv 1902.08153; specification of the method, 2.1).

For a tensor x, b bits and step s: code k = round_half_even(clamp(x / s, low, high)), value k s. Signed tensors have
low = -2^(b-1), high = 2^(b-1) - 1; unsigned ones low = 0, high = 2^b - 1; b >= 32 leaves the tensor as it is.
"""

import math
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from papercore.errors import InputError
from torch import Tensor, nn

from oneshot_mpq.quantize import lsq_fake_quantize

FLOAT = 32
"""bits from which on a tensor is not quantised"""
STEP_FLOOR = 1e-8
"""no step is smaller"""


def check_bits(bits: Iterable[int], name: str = "bits") -> tuple[int, ...]:
    """Candidate bit-widths in ascending order.

    Raises:
        InputError: empty, double, or not in 2..8 or 32.
    """
    given = tuple(bits)
    right = "different whole numbers in 2..8, or 32 for floating point"
    if not given or len(set(given)) != len(given):
        raise InputError(name, found=given, expected=right)
    for b in given:
        if isinstance(b, bool) or not isinstance(b, int) or not (2 <= b <= 8 or b == FLOAT):
            raise InputError(name, found=b, expected=right)
    return tuple(sorted(given))


def code_range(bits: int, signed: bool, symmetric: bool = False) -> tuple[int, int]:
    """Smallest and largest code."""
    if not signed:
        return 0, 2**bits - 1
    return -(2 ** (bits - 1)) + int(symmetric), 2 ** (bits - 1) - 1


class LSQ(nn.Module):
    """The quantiser of one tensor at any of its bit-widths; every width has its own step.

    Args:
        bits: candidates, 2..8 or 32.
        signed: whether codes may be negative.
        symmetric: leave out the smallest signed code.
        channels: one step for each of so many rows of the first dimension; nothing: one for the whole tensor.
        gradient_scaling: multiply a step's gradient by 1 / sqrt(high numel). The paper's configurations do not.
    """

    initialised: Bool[Tensor, " bits"]
    sign: Bool[Tensor, ""]

    def __init__(
        self,
        bits: Iterable[int],
        signed: bool = True,
        *,
        symmetric: bool = False,
        channels: int | None = None,
        gradient_scaling: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.bits = check_bits(bits)
        self.symmetric, self.channels, self.gradient_scaling = symmetric, channels, gradient_scaling
        self._index = {b: i for i, b in enumerate(self.bits)}
        shape = (len(self.bits),) if channels is None else (len(self.bits), channels)
        self.steps = nn.Parameter(torch.ones(shape, device=device, dtype=dtype))
        self.steps.requires_grad_(self.bits != (FLOAT,))
        self.register_buffer("initialised", torch.tensor([b >= FLOAT for b in self.bits], device=device))
        self.register_buffer("sign", torch.tensor(signed, device=device))
        self._read_buffers()

    def _read_buffers(self) -> None:
        """Keeps what the forward pass asks on the Python side: reading a GPU's buffer would stop it."""
        self._signed = bool(self.sign)
        self.ready = bool(self.initialised.all())
        """whether every step has been set"""

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._read_buffers()

    @property
    def signed(self) -> bool:
        return self._signed

    @signed.setter
    def signed(self, value: bool) -> None:
        self.sign.fill_(value)
        self._signed = bool(value)

    def low(self, bits: int) -> int:
        return code_range(bits, self._signed, self.symmetric)[0]

    def high(self, bits: int) -> int:
        return code_range(bits, self._signed, self.symmetric)[1]

    def step(self, bits: int) -> Float[Tensor, "*channels"]:
        """The step of a bit-width: a scalar, or one for each channel.

        Raises:
            InputError: `bits` is no candidate.
        """
        if bits not in self._index:
            raise InputError("bits", found=bits, expected=f"one of {self.bits}")
        return self.steps[self._index[bits]]

    def _spread(self, x: Tensor, bits: int) -> Tensor:
        """The step as it divides `x`."""
        step = self.step(bits)
        return step if self.channels is None else step.reshape(-1, *[1] * (x.ndim - 1))

    def forward(self, x: Float[Tensor, "*shape"], bits: int) -> Float[Tensor, "*shape"]:
        """`x` on the grid of `bits`, with the gradients of 2.1. A quantiser met before it was set sets itself."""
        if bits >= FLOAT:
            return x
        if not self.ready:
            self.initialise_activation(x)
        scale = 1 / math.sqrt(self.high(bits) * x.numel()) if self.gradient_scaling and x.numel() else 1.0
        return lsq_fake_quantize(x, self._spread(x, bits), self.low(bits), self.high(bits), scale)

    @torch.no_grad()
    def codes(self, x: Float[Tensor, "*shape"], bits: int) -> Int[Tensor, "*shape"]:
        """The integer codes (int32)."""
        return (x / self._spread(x, bits)).clamp(self.low(bits), self.high(bits)).round().to(torch.int32)

    @torch.no_grad()
    def initialise_weight(self, weight: Float[Tensor, "out *rest"]) -> None:
        """Every step: max(|m - 3 sd|, |m + 3 sd|) / 2^(b-1) of all weights, or of a row (LSQ+, arXiv 2004.09576)."""
        rows = weight.reshape(1 if self.channels is None else self.channels, -1)
        mean = rows.mean(1)
        spread = 3 * rows.std(1) if rows.shape[1] > 1 else torch.zeros_like(mean)
        largest = torch.maximum((mean - spread).abs(), (mean + spread).abs())
        self._set({b: largest / 2 ** (b - 1) for b in self.bits if b < FLOAT})

    @torch.no_grad()
    def initialise_activation(self, x: Float[Tensor, "*shape"]) -> None:
        """Every step: 2 mean|x| / sqrt(high), over the whole tensor."""
        self.initialise_from_mean(x.detach().to(self.steps.dtype).abs().mean())

    @torch.no_grad()
    def initialise_from_mean(self, magnitude: Float[Tensor, ""]) -> None:
        """The same from mean|x|."""
        self._set({b: 2 * magnitude / math.sqrt(self.high(b)) for b in self.bits if b < FLOAT})

    def _set(self, steps: dict[int, Tensor]) -> None:
        for b, step in steps.items():
            if not torch.isfinite(step).all():
                raise InputError(f"the tensor whose {b}-bit step is set", found="NaN or infinity", expected="numbers")
            if (step < STEP_FLOOR).any():
                warnings.warn(f"all values are zero: the {b}-bit step becomes {STEP_FLOOR:g}", stacklevel=4)
            self.steps.data[self._index[b]] = step.clamp(min=STEP_FLOOR).reshape(self.steps.shape[1:])
        self.initialised.fill_(True)
        self.ready = True

    def extra_repr(self) -> str:
        return f"bits={self.bits}, signed={self._signed}"
