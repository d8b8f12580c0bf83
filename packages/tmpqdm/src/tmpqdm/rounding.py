"""Learned rounding of weights (AdaRound, arXiv 2004.10568, as Q-Diffusion and TMPQ-DM use it).

h(a) = clip(sigmoid(a) (zeta - gamma) + gamma, 0, 1),  gamma = -0.1, zeta = 1.1
soft weight  d (clip(floor(w/d) + h(a) + z, 0, n-1) - z);  hard weight: [a >= 0] instead of h(a)
regulariser  0.01 sum(1 - |2 h(a) - 1|^beta), beta from 20 down to 2 after a fifth of the iterations
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

GAMMA, ZETA = -0.1, 1.1
WEIGHT = 0.01
"""of the regulariser"""


def rectified_sigmoid(alpha: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """h(a), in [0, 1]."""
    return (alpha.sigmoid() * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def initial_alpha(weight: Float[Tensor, "*shape"], delta: Tensor) -> Float[Tensor, "*shape"]:
    """a with h(a) = w/d - floor(w/d)."""
    ratio = weight / delta
    return -((ZETA - GAMMA) / (ratio - ratio.floor() - GAMMA) - 1).log()


def temperature(step: int, iterations: int, *, warmup: float = 0.2, start: float = 20, end: float = 2) -> float | None:
    """beta at `step` (from 1) of `iterations`; None while the regulariser is off."""
    if step < warmup * iterations:
        return None
    return end + (start - end) * max(0.0, 1 - (step - warmup * iterations) / ((1 - warmup) * iterations))


def regulariser(h: Float[Tensor, "*shape"], beta: float, weight: float = WEIGHT) -> Float[Tensor, ""]:
    """weight x sum(1 - |2h - 1|^beta)."""
    return weight * (1 - (2 * h - 1).abs().pow(beta)).sum()


def nearest_up(weight: Float[Tensor, "*shape"], delta: Tensor) -> Bool[Tensor, "*shape"]:
    """Where rounding to nearest (half to even) goes up from the floor."""
    ratio = weight.float() / delta
    return ratio.round() > ratio.floor()


def rounded_codes(
    weight: Float[Tensor, "*shape"], delta: Tensor, zero: Tensor, up: Bool[Tensor, "*shape"], bits: int
) -> Float[Tensor, "*shape"]:
    """Whole numbers 0..2^b-1, as float32."""
    return ((weight.float() / delta).floor() + up + zero).clamp(0, 2**bits - 1)


def rounded_weight(
    weight: Float[Tensor, "*shape"], delta: Tensor, zero: Tensor, up: Bool[Tensor, "*shape"], bits: int
) -> Float[Tensor, "*shape"]:
    """The hard weight, float32."""
    return (rounded_codes(weight, delta, zero, up, bits) - zero) * delta


class SoftRounding:
    """The rounding variables of one weight (or of one half of it) while they are learned."""

    def __init__(self, weight: Tensor, delta: Tensor, zero: Tensor, bits: int) -> None:
        weight = weight.detach().float()
        self.delta, self.zero = delta, zero
        self.top = 2**bits - 1
        self.base = (weight / delta).floor() + zero
        self.alpha = initial_alpha(weight, delta).requires_grad_()

    def soft(self) -> tuple[Tensor, Tensor]:
        """(weight, h); gradients reach `alpha`."""
        h = rectified_sigmoid(self.alpha)
        return ((self.base + h).clamp(0, self.top) - self.zero) * self.delta, h

    def up(self) -> Bool[Tensor, "*shape"]:
        return self.alpha.detach() >= 0

    def hard(self) -> Tensor:
        return ((self.base + self.up()).clamp(0, self.top) - self.zero) * self.delta


class JointRounding:
    """The variables of several weights as one vector, with the gradient written out.

    With f = floor(w/d), clip(f + h + z, 0, n-1) - z is c + h room, where c is f clipped and room is 1 where f and f + 1
    are both legal codes, else 0. A unit then costs a dozen operations an iteration, however many layers it has.
    """

    def __init__(self, parts: Sequence[SoftRounding]) -> None:
        self.parts = parts
        self.shapes = [part.alpha.shape for part in parts]
        self.sizes = [part.alpha.numel() for part in parts]
        floors, rooms = [], []
        for part in parts:
            legal = (part.base >= 0) & (part.base + 1 <= part.top)
            floors.append((part.base.clamp(0, part.top) - part.zero).mul(part.delta).reshape(-1))
            rooms.append((legal * part.delta).reshape(-1))
        self.floor, self.room = torch.cat(floors), torch.cat(rooms)
        self.alpha = torch.cat([part.alpha.detach().reshape(-1) for part in parts])
        for part, values in zip(parts, self._split(self.alpha), strict=True):
            part.alpha = values  # of the same memory: what is learned here is theirs
        self.sigmoid = self.h = self.alpha

    def weights(self) -> list[Tensor]:
        """The soft weights, as leaves that collect gradients."""
        self.sigmoid = self.alpha.sigmoid()
        self.h = (self.sigmoid * (ZETA - GAMMA)).add_(GAMMA).clamp_(0, 1)
        flat = torch.addcmul(self.floor, self.h, self.room)
        return [values.requires_grad_() for values in self._split(flat)]

    def gradient(self, of_weights: Sequence[Tensor], beta: float | None, weight: float) -> Tensor:
        """With respect to alpha, from those with respect to the last `weights` and from the regulariser at `beta`."""
        total = torch.cat([values.reshape(-1) for values in of_weights]).mul_(self.room)
        if beta is not None:
            signed = 2 * self.h - 1
            total.addcmul_(signed.abs().pow_(beta - 1), signed.sign_(), value=-2 * weight * beta)
        inside = (self.h > 0) & (self.h < 1)
        return total.mul_(self.sigmoid).mul_(1 - self.sigmoid).mul_(inside).mul_(ZETA - GAMMA)

    def _split(self, flat: Tensor) -> list[Tensor]:
        return [v.view(shape) for v, shape in zip(flat.split(self.sizes), self.shapes, strict=True)]


def pack_flags(flags: Bool[Tensor, "*shape"]) -> UInt8[Tensor, " bytes"]:
    """One bit a weight, little end first, on the CPU."""
    return torch.from_numpy(np.packbits(flags.cpu().numpy().reshape(-1), bitorder="little"))


def unpack_flags(packed: UInt8[Tensor, " bytes"], shape: torch.Size) -> Bool[Tensor, "*shape"]:
    count = shape.numel()
    return torch.from_numpy(np.unpackbits(packed.cpu().numpy(), count=count, bitorder="little").astype(bool)).reshape(
        shape
    )
