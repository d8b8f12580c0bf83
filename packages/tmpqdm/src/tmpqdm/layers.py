"""The switchable layer: a convolution or linear layer that holds all its bit-widths at once.

Weights are dequantised once for every width; switching binds another tensor. Activations pass through one `Step`.
A layer with a split point (the 1x1 shortcut of a decoder block, whose input is [main branch, skip branch]) has two
steps and two sets of weight parameters, for the input channels before and after it (Q-Diffusion, arXiv 2302.04304,
section 4.2).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor, nn

from tmpqdm.quantisers import Method, SplitStep, Step, weight_parameters
from tmpqdm.rounding import nearest_up, pack_flags, rounded_codes, rounded_weight, unpack_flags

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)

Quantiser = Callable[[Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class WeightHalf:
    """The calibrated quantiser of a weight, or of one half of it, at one bit-width."""

    delta: Tensor
    """[out, 1, ...] float32"""
    zero: Tensor
    """[out, 1, ...] float32, whole numbers in 0..2^b-1"""
    up: UInt8[Tensor, " bytes"]
    """whether a weight is rounded up from the floor of w/d, one bit each, on the CPU"""

    @classmethod
    def nearest(cls, weight: Tensor, bits: int, method: Method = "max") -> "WeightHalf":
        delta, zero = weight_parameters(weight, bits, method)
        return cls(delta, zero, pack_flags(nearest_up(weight, delta)))

    def codes(self, weight: Tensor, bits: int) -> Tensor:
        up = unpack_flags(self.up, weight.shape).to(weight.device)
        return rounded_codes(weight, self.delta, self.zero, up, bits)

    def values(self, weight: Tensor, bits: int) -> Tensor:
        up = unpack_flags(self.up, weight.shape).to(weight.device)
        return rounded_weight(weight, self.delta, self.zero, up, bits)

    def to(self, device: torch.device) -> "WeightHalf":
        return WeightHalf(self.delta.to(device), self.zero.to(device), self.up)


class QuantLayer(nn.Module):
    """One layer at switchable bits.

    Attributes:
        layer: the layer in full precision.
        split: input channels of the first half, or None.
        halves: bits -> the one or two calibrated weight quantisers.
        dense: bits -> the dequantised weight, in the layer's type.
        steps: bits -> the activation quantiser.
    """

    def __init__(self, layer: nn.Module, split: int | None = None) -> None:
        super().__init__()
        self.layer = layer
        self.split = split
        self.halves: dict[int, tuple[WeightHalf, ...]] = {}
        self.dense: dict[int, Tensor] = {}
        self.steps: dict[int, Any] = {}
        self.bits: dict[str, int | None] = {"w": None, "a": None}
        self.compute: Callable[..., Tensor] = (
            torch.nn.functional.linear if isinstance(layer, nn.Linear) else layer._conv_forward  # pyright: ignore[reportAttributeAccessIssue]
        )
        self.use()

    def forward(self, x: Tensor) -> Tensor:
        act = self.act
        return self.compute(x if act is None else act(x), self.w, self.b)

    def use(self, w: int | None = None, a: int | None = None) -> None:
        """Switches to weights of `w` and activations of `a` bits; None is full precision."""
        self.bits = {"w": w, "a": a}
        self.w: Tensor = self.weight.detach() if w is None else self.dense[w]
        self.b: Tensor | None = None if self.bias is None else self.bias.detach()
        self.act: Quantiser | None = None if a is None else self.steps[a]

    def set(self, gene: str, bits: int | None) -> None:
        """Switches one of the two."""
        self.use(**(self.bits | {gene: bits}))

    @property
    def weight(self) -> Tensor:
        return self.layer.weight  # pyright: ignore[reportReturnType]

    @property
    def bias(self) -> Tensor | None:
        return self.layer.bias  # pyright: ignore[reportReturnType]

    def weights(self) -> tuple[Tensor, ...]:
        """The float weight, or its two halves along the input channels."""
        weight = self.weight.detach()
        return (weight,) if self.split is None else (weight[:, : self.split], weight[:, self.split :])

    def round_to_nearest(self, bits: int, method: Method = "max") -> None:
        self.set_halves(bits, tuple(WeightHalf.nearest(weight, bits, method) for weight in self.weights()))

    def set_halves(self, bits: int, halves: tuple[WeightHalf, ...]) -> None:
        """Takes calibrated weight quantisers and dequantises once."""
        self.halves[bits] = halves
        values = [half.values(weight, bits) for half, weight in zip(halves, self.weights(), strict=True)]
        self.set_dense(bits, torch.cat(values, 1))

    def set_dense(self, bits: int, weight: Tensor) -> None:
        """Takes a dequantised weight. A convolution's is kept channels-last: its outputs follow, and so does all that
        comes after, which most convolution libraries are faster with."""
        layout = torch.channels_last if weight.ndim == 4 else torch.contiguous_format
        self.dense[bits] = weight.to(self.weight.dtype).contiguous(memory_format=layout)

    def codes(self, bits: int) -> tuple[Tensor, ...]:
        """The weight's whole numbers, one tensor a half, float32."""
        return tuple(half.codes(w, bits) for half, w in zip(self.halves[bits], self.weights(), strict=True))

    def set_steps(self, steps: tuple[Step, ...]) -> None:
        """Takes the one or two calibrated activation quantisers of a bit-width."""
        self.steps[steps[0].bits] = steps[0] if self.split is None else SplitStep((steps[0], steps[1]), self.split)

    def step_halves(self, bits: int) -> tuple[Step, ...]:
        step = self.steps[bits]
        return step.halves if isinstance(step, SplitStep) else (step,)

    def __deepcopy__(self, memo: dict[int, Any]) -> "QuantLayer":
        import copy

        made = QuantLayer(copy.deepcopy(self.layer, memo), self.split)
        made.halves = copy.deepcopy(self.halves, memo)
        made.dense = copy.deepcopy(self.dense, memo)
        made.steps = copy.deepcopy(self.steps, memo)
        made.use(**self.bits)
        made.training = self.training
        return made

    def _apply(self, fn: Any, recurse: bool = True) -> "QuantLayer":
        super()._apply(fn, recurse)
        device = self.weight.device
        self.dense = {bits: fn(weight) for bits, weight in self.dense.items()}
        self.halves = {bits: tuple(half.to(device) for half in halves) for bits, halves in self.halves.items()}
        self.steps = {bits: step.to(device) for bits, step in self.steps.items()}
        self.use(**self.bits)
        return self

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # in_channels, stride and the like, which models ask their layers for
            if name in ("layer", "w", "b", "act"):
                raise
            return getattr(super().__getattr__("layer"), name)
