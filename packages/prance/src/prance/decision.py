"""What is decided for an image: widths, MLP ratios and keep ratios (PRANCE, section on the action space)."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from papercore.errors import InputError
from torch import Tensor

from prance.space import SearchSpace

Tokens = Literal["prune", "merge", "prune_merge"]
MODES: tuple[Tokens, ...] = ("prune", "merge", "prune_merge")


@dataclasses.dataclass(frozen=True)
class Decision:
    """Decisions for a batch of images; all tensors on the CPU.

    Raises:
        InputError: a shape does not fit the space, a width or ratio is out of range, or a keep ratio is not in [0, 1].
    """

    space: SearchSpace
    embed: Int[Tensor, "batch depth"]
    """width at the input of every block"""
    mlp_ratio: Float[Tensor, "batch depth"]
    """float64"""
    prune: Float[Tensor, "batch points"]
    """share of tokens that pruning keeps at every decision point, in [0, 1], float64; 0 keeps the class token"""
    merge: Float[Tensor, "batch points"]
    """share that is left after merging, in [0, 1], float64; 1 merges none"""

    def __post_init__(self) -> None:
        depth, points = self.space.depth, len(self.space.points)
        shapes = {"embed": depth, "mlp_ratio": depth, "prune": points, "merge": points}
        batch = len(self.embed)
        for name, length in shapes.items():
            value = torch.as_tensor(getattr(self, name)).cpu()
            value = value.to(torch.int64 if name == "embed" else torch.float64)
            object.__setattr__(self, name, value)
            if value.shape != (batch, length):
                raise InputError(f"decision {name}", found=tuple(value.shape), expected=f"({batch}, {length})")
        for name, low, high in (
            ("embed", 1, self.space.width),
            ("mlp_ratio", 0.0, float(self.space.super_ratio or 0)),
            ("prune", 0.0, 1.0),
            ("merge", 0.0, 1.0),
        ):
            value = getattr(self, name)
            good = (value <= high) & ((value > low) if name == "mlp_ratio" else (value >= low))
            if not bool(good.all()):
                image, layer = (int(i) for i in (~good).nonzero()[0])
                place = "block" if name in ("embed", "mlp_ratio") else "point"
                raise InputError(
                    f"decision {name} of image {image}, {place} {layer}",
                    found=value[image, layer].item(),
                    expected=f"{'above' if name == 'mlp_ratio' else 'at least'} {low:g} and at most {high:g}",
                )
        if batch and int(self.hidden.min()) < 1:
            raise InputError("decision mlp_ratio", found=float(self.mlp_ratio.min()), expected="a hidden channel")

    def __len__(self) -> int:
        return len(self.embed)

    def __getitem__(self, index: Any) -> "Decision":
        """The decisions of some images."""
        index = [index] if isinstance(index, int) else index
        return Decision(self.space, self.embed[index], self.mlp_ratio[index], self.prune[index], self.merge[index])

    @property
    def hidden(self) -> Int[Tensor, "batch depth"]:
        """Hidden channels of every MLP, floor(E r)."""
        return (self.embed * self.mlp_ratio).floor().long()

    @property
    def output(self) -> Int[Tensor, "batch depth"]:
        """Width at the output of every block: that of the next block's input."""
        return torch.cat([self.embed[:, 1:], self.embed[:, -1:]], 1)

    @property
    def uniform(self) -> bool:
        """Whether all images have the same decision."""
        return len(self) < 2 or all(bool((v == v[:1]).all()) for v in self.tensors())

    def tensors(self) -> tuple[Tensor, ...]:
        return self.embed, self.mlp_ratio, self.prune, self.merge

    def expand(self, batch: int) -> "Decision":
        """One decision for `batch` images, or these if there are that many.

        Raises:
            InputError: there are several, and not that many.
        """
        if len(self) == batch:
            return self
        if len(self) != 1:
            raise InputError("decisions", found=len(self), expected=f"1 or {batch}, one an image")
        return Decision(self.space, *(value.expand(batch, -1).clone() for value in self.tensors()))

    def replaced(self, point: int, embed: Tensor, mlp_ratio: Tensor, prune: Tensor, merge: Tensor) -> "Decision":
        """With the blocks of decision number `point` set; shapes [batch, blocks] and [batch]."""
        blocks = self.space.decided(point)
        new = [value.clone() for value in self.tensors()]
        new[0][:, blocks.start : blocks.stop] = embed[:, : len(blocks)].to(new[0])
        new[1][:, blocks.start : blocks.stop] = mlp_ratio[:, : len(blocks)].to(new[1])
        new[2][:, point] = prune.to(new[2])
        new[3][:, point] = merge.to(new[3])
        return Decision(self.space, *new)

    @classmethod
    def static(
        cls,
        space: SearchSpace,
        embed: int | Sequence[int],
        mlp_ratio: float | Sequence[float],
        *,
        prune: float | Sequence[float] = 1.0,
        merge: float | Sequence[float] = 1.0,
        batch: int = 1,
    ) -> "Decision":
        """The same for `batch` images; a single number stands for all blocks or decision points.

        Keep ratios may be given for every block too: they must then be 1 outside the decision points.
        """

        def row(name: str, value: Any, length: int) -> list[Any]:
            values = [value] * length if isinstance(value, int | float) else list(value)
            if name in ("prune", "merge") and len(values) == space.depth != length:
                if any(v != 1 for i, v in enumerate(values) if i not in space.points):
                    raise InputError(f"decision {name}", found=values, expected="1 outside the decision points")
                values = [values[i] for i in space.points]
            if name in ("prune", "merge"):
                for point, v in enumerate(values):
                    if not 0 < v <= 1:
                        raise InputError(f"decision {name} of point {point}", found=v, expected="in (0, 1]")
            return values

        depth, points = space.depth, len(space.points)
        rows = (row("embed", embed, depth), row("mlp_ratio", mlp_ratio, depth))
        rows += (row("prune", prune, points), row("merge", merge, points))
        types = (torch.int64, torch.float64, torch.float64, torch.float64)
        tensors = [torch.tensor([values] * batch, dtype=t) for values, t in zip(rows, types, strict=True)]
        if batch == 0:
            tensors = [t.reshape(0, len(values)) for t, values in zip(tensors, rows, strict=True)]
        return cls(space, *tensors)

    @classmethod
    def largest(cls, space: SearchSpace, batch: int = 1) -> "Decision":
        """The largest choices, no token reduction."""
        return cls.static(space, space.embed[-1], space.mlp_ratio[-1], batch=batch)

    @classmethod
    def smallest(cls, space: SearchSpace, batch: int = 1) -> "Decision":
        """The smallest choices in every block (the first group too), no token reduction."""
        return cls.static(space, space.embed[0], space.mlp_ratio[0], batch=batch)

    @classmethod
    def random(
        cls,
        space: SearchSpace,
        generator: torch.Generator,
        *,
        batch: int = 1,
        tokens: Tokens | None = None,
        within_groups: float = 1.0,
        same: bool = False,
    ) -> "Decision":
        """Uniform choices; the first group is random too unless it is overwritten.

        Args:
            tokens: which keep ratios are drawn, uniformly in (0, 1]; None keeps all tokens.
            within_groups: probability that widths differ inside a group; otherwise one is drawn for each group.
            same: one decision for all images.
        """
        rows = 1 if same else batch
        widths = torch.tensor(space.embed)
        choice = torch.randint(len(widths), (rows, space.depth), generator=generator)
        per_group = torch.rand(rows, 1, generator=generator) >= within_groups
        first = torch.arange(space.depth) // space.group * space.group
        choice = torch.where(per_group, choice[:, first], choice)
        ratios = torch.tensor(space.mlp_ratio, dtype=torch.float64)
        ratio = ratios[torch.randint(len(ratios), (rows, space.depth), generator=generator)]
        keep = 1 - torch.rand(2, rows, len(space.points), generator=generator, dtype=torch.float64)
        for index, mode in enumerate(("prune", "merge")):
            if tokens is None or mode not in tokens:
                keep[index] = 1.0
        made = cls(space, widths[choice], ratio, keep[0], keep[1])
        return made.expand(batch) if same else made

    def rows(self) -> list[dict[str, Any]]:
        """One dictionary an image, as the files of decisions have it."""
        names = ("embed", "mlp_ratio", "keep", "merge")
        return [
            dict(zip(names, (value[i].tolist() for value in self.tensors()), strict=True)) for i in range(len(self))
        ]


def action_length(space: SearchSpace, mode: Tokens) -> int:
    """Numbers a decision takes: ratios and widths of a group, then one keep ratio, or two."""
    return 2 * space.group + (2 if mode == "prune_merge" else 1)


def decode_action(
    action: Float[Tensor, "batch length"], space: SearchSpace, mode: Tokens
) -> tuple[Float[Tensor, "batch group"], Int[Tensor, "batch group"], Float[Tensor, " batch"], Float[Tensor, " batch"]]:
    """Choices that an action in [0, 1] stands for: MLP ratios, widths, share kept by pruning, share left by merging.

    Choice number = round half to even of a (number of choices - 1), a clipped to [0, 1]. A keep ratio is the clipped
    number itself (0 keeps the class token alone).

    Raises:
        InputError: the length does not fit, or a number is not finite.
    """
    if mode not in MODES:
        raise InputError("token mode", found=mode, expected=" or ".join(MODES))
    length = action_length(space, mode)
    if action.ndim != 2 or action.shape[1] != length:
        raise InputError("action", found=tuple(action.shape), expected=f"(batch, {length}) for mode {mode}")
    action = action.detach().cpu().double()
    if not bool(torch.isfinite(action).all()):
        raise InputError("action", found="a number that is not finite", expected="numbers in [0, 1]")
    action = action.clamp(0, 1)
    ratios = torch.tensor(space.mlp_ratio, dtype=torch.float64)
    widths = torch.tensor(space.embed)
    ratio = ratios[(action[:, : space.group] * (len(ratios) - 1)).round().long()]
    embed = widths[(action[:, space.group : 2 * space.group] * (len(widths) - 1)).round().long()]
    keep = action[:, 2 * space.group :]
    one = torch.ones(len(action), dtype=torch.float64)
    prune = keep[:, 0] if mode in ("prune", "prune_merge") else one
    merge = keep[:, -1] if mode in ("merge", "prune_merge") else one
    return ratio, embed, prune, merge


def keep_count(ratio: Float[Tensor, " batch"], count: Int[Tensor, " batch"], least: int) -> Int[Tensor, " batch"]:
    """max(least, floor(ratio n)), the product in float64 (a ratio of float32 is taken as the float64 it is)."""
    return (ratio.double() * count.double()).floor().long().clamp(min=least).minimum(count)
