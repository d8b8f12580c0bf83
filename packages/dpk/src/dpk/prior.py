"""The share of the teacher's tokens, and which tokens these are (equations of the dynamic prior, decision 0016)."""

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Bool, Float
from papercore.errors import InputError
from torch import Tensor
from torch.nn import functional

Strategy = Literal["random", "block", "highest-error"]
Schedule = Callable[[int], float]
"""epoch, counted from 0 -> share"""


def prior_mask(
    scores: Float[Tensor, "batch tokens"], rho: float | Float[Tensor, ""] | Float[Tensor, " batch"]
) -> Bool[Tensor, "batch tokens"]:
    """True where the token is the teacher's: the m = floor(rho N + 1/2) smallest scores of every image.

    Args:
        scores: of equal ones the lower index counts as smaller.
        rho: clipped to [0, 1]; a tensor stays on its device, [batch] for a share of its own for every image.

    Raises:
        InputError: the scores are no matrix.
    """
    if scores.ndim != 2:
        raise InputError("scores", found=tuple(scores.shape), expected="[batch, tokens]")
    tokens = scores.shape[1]
    if not isinstance(rho, Tensor):
        # rounded here: a scalar that travels to the device would have to wait for it
        return ranks(scores) < int(min(max(rho, 0.0), 1.0) * tokens + 0.5)
    count = torch.floor(rho.double().clamp(0, 1) * tokens + 0.5)
    return ranks(scores) < (count[:, None] if count.ndim else count)


def ranks(scores: Float[Tensor, "batch tokens"]) -> Tensor:
    """The position of every score in its row's ascending order."""
    order = torch.argsort(scores, dim=1, stable=True)
    positions = torch.arange(scores.shape[1], device=scores.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, positions)


def scores_of(
    strategy: Strategy,
    batch: int,
    grid: tuple[int, int],
    *,
    generator: torch.Generator | None,
    device: torch.device,
    error: Float[Tensor, "batch tokens"] | None = None,
) -> Float[Tensor, "batch tokens"]:
    """Scores for `prior_mask`, in [0, 1) for "random".

    "block" prefers the tokens nearest to a random one, so that the teacher's form one patch; "highest-error" those
    where `error` is largest.
    """
    height, width = grid
    if strategy == "highest-error":
        assert error is not None
        return -error.detach().float()
    noise = torch.rand(batch, height * width, generator=generator, device=device)
    if strategy == "random":
        return noise
    centre = torch.rand(batch, 2, generator=generator, device=device)
    rows = torch.arange(height, device=device) - (centre[:, :1] * height).floor()
    columns = torch.arange(width, device=device) - (centre[:, 1:] * width).floor()
    distance = torch.maximum(rows.abs()[:, :, None], columns.abs()[:, None, :]).flatten(1)
    return distance + 0.5 * noise


def pixel_mask(
    mask: Bool[Tensor, "batch tokens"], grid: tuple[int, int], size: tuple[int, int], patch: int
) -> Bool[Tensor, "batch 1 h w"]:
    """The mask of tokens on the pixels that they stand for."""
    tokens = mask.view(len(mask), 1, *grid)
    return functional.interpolate(tokens.float(), scale_factor=patch, mode="nearest")[..., : size[0], : size[1]].bool()


def ratio(cka: Tensor, least: float = 0.0, most: float = 1.0) -> Tensor:
    """rho = clip(1 - CKA, least, most)."""
    return (1 - cka).clamp(least, most)


def smooth(previous: Tensor, cka: Tensor, momentum: float) -> Tensor:
    """Exponentially smoothed CKA; every value is clipped to [0, 1] before it counts."""
    return momentum * previous + (1 - momentum) * cka.clamp(0, 1)
