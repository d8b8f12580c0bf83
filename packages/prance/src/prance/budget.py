"""Keeping to a budget while images run: a cap for every image, and a mean over a stream of images."""

import dataclasses
import re

import torch
from jaxtyping import Int
from papercore.errors import InputError
from torch import Tensor

from prance.decision import Decision
from prance.macs import Geometry, macs


def parse_macs(text: str | float) -> int:
    """ "2.2G", "300M" or a number of MACs.

    Raises:
        InputError: anything else, or not above 0.
    """
    match = re.fullmatch(r"\s*([0-9.]+(?:[eE][+-]?[0-9]+)?)\s*([kKMGT]?)\s*", str(text))
    scale = {"": 1, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
    try:
        value = float(match[1]) * scale[match[2]] if match else 0.0
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise InputError("budget", found=text, expected='a number of MACs above 0, for example "2.2G"')
    return round(value)


def reachable(decision: Decision, geometry: Geometry) -> tuple[int, int]:
    """(smallest, largest) MACs under a selector: the first group at the largest choice, the others at the smallest
    with one token kept, or at the largest with all.

    Args:
        decision: any of the space.
    """
    space = decision.space
    large = Decision.largest(space)
    small = Decision.static(
        space,
        [space.embed[-1] if block < space.group else space.embed[0] for block in range(space.depth)],
        [space.mlp_ratio[-1] if block < space.group else space.mlp_ratio[0] for block in range(space.depth)],
    )
    zero = torch.zeros_like(small.prune)
    return int(macs(geometry, dataclasses.replace(small, prune=zero))), int(macs(geometry, large))


def check_budget(budget: int, decision: Decision, geometry: Geometry) -> None:
    """Raises InputError unless the budget can be met and is no more than the largest subnet."""
    low, high = reachable(decision, geometry)
    if not low <= budget <= high:
        raise InputError(
            "budget", found=f"{budget / 1e9:.4g} GMAC", expected=f"from {low / 1e9:.4g} to {high / 1e9:.4g} GMAC"
        )


def smallest_rest(decision: Decision, point: int) -> Decision:
    """With every group after decision number `point` at the smallest choices and one token kept."""
    space = decision.space
    for later in range(point + 1, len(space.points)):
        blocks = len(space.decided(later))
        batch = len(decision)
        decision = decision.replaced(
            later,
            torch.full((batch, blocks), space.embed[0]),
            torch.full((batch, blocks), space.mlp_ratio[0], dtype=torch.float64),
            torch.zeros(batch, dtype=torch.float64),
            torch.ones(batch, dtype=torch.float64),
        )
    return decision


def capped(
    decision: Decision, point: int, cap: Int[Tensor, " batch"] | int, geometry: Geometry, *, step: float = 0.9
) -> Decision:
    """The decision with its group `point` made cheaper for the images that could not keep to the cap any more.

    An image can keep to it when its MACs, with all later groups at their smallest, are within it. Until then, its
    group takes one step down in turn: MLP ratios one choice down, widths one choice down, a tenth of the tokens less.
    """
    space = decision.space
    blocks = space.decided(point)
    widths, ratios = torch.tensor(space.embed), torch.tensor(space.mlp_ratio, dtype=torch.float64)
    turn = 0
    while True:
        over = macs(geometry, smallest_rest(decision, point)) > torch.as_tensor(cap)
        if not bool(over.any()):
            return decision
        embed = decision.embed[:, blocks.start : blocks.stop].clone()
        ratio = decision.mlp_ratio[:, blocks.start : blocks.stop].clone()
        prune = decision.prune[:, point].clone()
        if turn % 3 == 0:
            lower = (torch.searchsorted(ratios, ratio[over]) - 1).clamp(min=0)
            ratio[over] = torch.minimum(ratios[lower], ratio[over])
        elif turn % 3 == 1:
            lower = (torch.searchsorted(widths, embed[over]) - 1).clamp(min=0)
            embed[over] = torch.minimum(widths[lower], embed[over])
        else:
            prune[over] = torch.where(prune[over] < 1e-3, 0.0, prune[over] * step)
        smaller = decision.replaced(point, embed, ratio, prune, decision.merge[:, point])
        if turn > 300:
            return smaller  # everything is at its smallest: the cap is below what the first group costs
        decision, turn = smaller, turn + 1


class MeanController:
    """Integral control of the mean MACs of a stream: how far actions are shifted down to stay within the budget.

    What an image gets then depends on the images before it.

    Args:
        budget: MACs an image, on average.
        gain: shift of the action for a relative excess of 1, added up image by image.
    """

    def __init__(self, budget: int, gain: float = 0.02) -> None:
        self.budget, self.gain, self.shift = budget, gain, 0.0
        self.images, self.total = 0, 0

    def observe(self, spent: Int[Tensor, " batch"]) -> None:
        """Takes the MACs of a batch into account."""
        self.images += len(spent)
        self.total += int(spent.sum())
        excess = float((spent.double() / self.budget - 1).sum())
        self.shift = min(1.0, max(-1.0, self.shift + self.gain * excess))

    @property
    def mean(self) -> float:
        """MACs an image so far."""
        return self.total / max(1, self.images)
