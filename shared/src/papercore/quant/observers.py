"""Ranges learned from calibration batches, for static activation quantisation."""

import torch
from jaxtyping import Float
from torch import Tensor

from papercore.errors import InputError
from papercore.quant.affine import Parameters, code_range, parameters_of_range, resolve_group_size, split_groups


class RangeObserver:
    """Moving average of the smallest and largest value of every group, over all rows of a batch.

    The first batch sets the range r; every later one moves it: r <- (1 - momentum) r + momentum r_batch. The range
    always contains 0; a symmetric one reaches as far as the larger end. (Q-DiT, arXiv 2406.17343, section 4, the static
    baseline; the same rule with momentum 0.05 in TMPQ-DM, arXiv 2404.09532.)

    Args:
        bits: 2 to 8.
        group_size: columns a group; None or 0 puts the whole tensor into one group.
        momentum: weight of a new batch, in (0, 1].
    """

    def __init__(self, bits: int, group_size: int | None, momentum: float = 0.1, *, symmetric: bool = False) -> None:
        code_range(bits, symmetric)
        if not 0 < momentum <= 1:
            raise InputError("momentum", found=momentum, expected="in (0, 1]")
        if group_size is not None and group_size < 0:
            raise InputError("group size", found=group_size, expected="at least 1, or None for one group")
        self.bits, self.group_size, self.momentum, self.symmetric = bits, group_size, momentum, symmetric
        self.columns: int | None = None
        self.low: Tensor | None = None
        self.high: Tensor | None = None

    @torch.no_grad()
    def update(self, x: Float[Tensor, "*rows columns"]) -> None:
        """Takes one batch [..., K] into account; an empty one changes nothing."""
        if x.numel() == 0:
            return
        if not torch.isfinite(x).all():
            raise InputError("calibration batch", found="values that are not finite", expected="finite ones")
        if self.columns is not None and x.shape[-1] != self.columns:
            raise InputError("calibration batch", found=f"{x.shape[-1]} columns", expected=f"{self.columns} as before")
        self.columns = x.shape[-1]
        rows = x.float().reshape(-1, x.shape[-1])
        groups = split_groups(rows, resolve_group_size(x.shape[-1], self.group_size))
        low, high = groups.amin((0, 2)), groups.amax((0, 2))
        if self.low is None or self.high is None:
            self.low, self.high = low, high
        else:
            self.low = (1 - self.momentum) * self.low + self.momentum * low
            self.high = (1 - self.momentum) * self.high + self.momentum * high

    def parameters(self) -> Parameters:
        """Scale and zero point of every group, [G].

        Raises:
            InputError: no batch was seen.
        """
        if self.low is None or self.high is None:
            raise InputError("static range", found="no calibration batch", expected="at least one")
        low, high = self.low.clamp(max=0), self.high.clamp(min=0)
        return parameters_of_range(
            low, torch.maximum(-low, high) if self.symmetric else high, self.bits, symmetric=self.symmetric
        )
