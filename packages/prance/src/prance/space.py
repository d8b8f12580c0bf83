"""Which subnets a meta-network has: widths, MLP ratios, groups, decision points (PRANCE, arXiv 2407.05010)."""

import dataclasses
import math
import warnings

from papercore.errors import InputError

REFERENCE = {
    "tiny": ((176, 192, 216, 240), (2.0, 4.0, 6.0), 256, 3, 6.0),
    "small": ((320, 352, 368, 384, 400, 416), (2.0, 3.5, 5.0), 448, 7, 5.0),
    "base": ((672, 696, 720, 744, 768), (2.0, 3.5, 5.0), 768, 12, 5.0),
}
"""name -> choices of width, choices of the MLP ratio, super width, heads, super ratio of the published networks"""


@dataclasses.dataclass(frozen=True)
class SearchSpace:
    """The choices of a meta-network and the geometry they are made in.

    A width E is the number of embedding channels at the input of a block, an MLP ratio r gives floor(E r) hidden
    channels; both are prefixes of the super weights. Attention always has `heads` x `head_dim` channels. Blocks come in
    groups of `group`; the first group always runs at the largest choice, every other group is decided for each image
    when its first block (a decision point) is reached.

    Raises:
        InputError: a choice is out of order, repeated, above the super size, or the groups do not divide the depth.
    """

    embed: tuple[int, ...]
    """choices of the width, ascending"""
    mlp_ratio: tuple[float, ...]
    """choices of the MLP ratio, ascending"""
    group: int = 3
    """blocks a decision covers"""
    depth: int = 12
    """blocks"""
    heads: int = 12
    """attention heads"""
    head_dim: int = 64
    """channels of a head"""
    super_embed: int | None = None
    """width of the super weights; None: the largest choice"""
    super_ratio: float | None = None
    """MLP ratio of the super weights; None: the largest choice"""

    def __post_init__(self) -> None:
        object.__setattr__(self, "embed", tuple(int(value) for value in self.embed))
        object.__setattr__(self, "mlp_ratio", tuple(float(value) for value in self.mlp_ratio))
        for name in ("embed", "mlp_ratio"):
            values = getattr(self, name)
            if not values or min(values) <= 0 or not all(map(math.isfinite, values)):
                raise InputError(f"field {name}", found=values, expected="at least one choice above 0")
            if list(values) != sorted(set(values)):
                raise InputError(f"field {name}", found=values, expected="ascending choices without repetition")
        for name in ("group", "depth", "heads", "head_dim"):
            if getattr(self, name) < 1:
                raise InputError(f"field {name}", found=getattr(self, name), expected="at least 1")
        if self.depth % self.group:
            raise InputError("field group", found=self.group, expected=f"a divisor of the depth {self.depth}")
        for name, largest in (("super_embed", self.embed[-1]), ("super_ratio", self.mlp_ratio[-1])):
            if getattr(self, name) is None:
                object.__setattr__(self, name, largest)
            elif getattr(self, name) < largest:
                raise InputError(f"field {name}", found=getattr(self, name), expected=f"at least the choice {largest}")
        odd = [width for width in self.embed if width % 8]
        if odd:
            warnings.warn(f"widths {odd} are not multiples of 8: matrix products on a GPU are slower", stacklevel=2)

    @classmethod
    def reference(cls, size: str) -> "SearchSpace":
        """The published spaces "tiny", "small" and "base"."""
        if size not in REFERENCE:
            raise InputError("size", found=size, expected=" or ".join(REFERENCE))
        embed, ratio, width, heads, super_ratio = REFERENCE[size]
        return cls(embed, ratio, heads=heads, super_embed=width, super_ratio=super_ratio)

    @property
    def width(self) -> int:
        """The super width S."""
        assert self.super_embed is not None
        return self.super_embed

    @property
    def hidden(self) -> int:
        """Hidden channels of the super MLP."""
        assert self.super_ratio is not None
        return math.floor(self.width * self.super_ratio)

    @property
    def attention(self) -> int:
        """Channels of queries, keys and values, D."""
        return self.heads * self.head_dim

    @property
    def points(self) -> tuple[int, ...]:
        """Decision points: the first block of every group but the first, never the last block of the network."""
        return tuple(range(self.group, max(self.group, self.depth - 1), self.group))

    @property
    def projected(self) -> tuple[int, ...]:
        """Blocks with a residual projection: the last of every group but the last."""
        return tuple(range(self.group - 1, self.depth - 1, self.group))

    def decided(self, point: int) -> range:
        """The blocks that decision number `point` covers."""
        first = self.points[point]
        return range(first, min(first + self.group, self.depth))
