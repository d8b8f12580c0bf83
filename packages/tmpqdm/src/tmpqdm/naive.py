"""What the published scripts do in every forward pass, as the measure for ours: all weights are quantised again and
activations go through a chain of separate operations. The numbers are the same."""

from typing import Any

import torch
from torch import Tensor, nn

from tmpqdm.layers import QuantLayer
from tmpqdm.quantisers import Step
from tmpqdm.rounding import unpack_flags
from tmpqdm.solver import Bits, PrecisionSolver


def chain(x: Tensor, step: Step) -> Tensor:
    """The activation quantiser as separate operations."""
    low, high = step.lo + float(step.zero), step.hi + float(step.zero)
    q = torch.clamp(torch.round(x / step.delta) + step.zero, low, high)
    return (q - step.zero) * step.delta


class NaiveLayer(nn.Module):
    """Quantises its weight in every forward pass."""

    def __init__(self, layer: QuantLayer, w: int, a: int) -> None:
        super().__init__()
        self.layer, self.split, self.bits = layer.layer, layer.split, w
        self.compute = layer.compute
        self.halves = layer.halves[w]
        # rounding variables in floating point, as published; which side of 0 they are on is asked in every pass
        self.alphas = [
            unpack_flags(h.up, v.shape).to(v.device).float() - 0.5
            for h, v in zip(self.halves, layer.weights(), strict=True)
        ]
        self.steps = layer.step_halves(a)

    def forward(self, x: Tensor) -> Tensor:
        weight: Tensor = self.layer.weight  # pyright: ignore[reportAssignmentType]
        weights = (weight,) if self.split is None else (weight[:, : self.split], weight[:, self.split :])
        made = []
        for half, alpha, w in zip(self.halves, self.alphas, weights, strict=True):
            q = torch.clamp(torch.floor(w / half.delta) + (alpha >= 0).float() + half.zero, 0, 2**self.bits - 1)
            made.append((q - half.zero) * half.delta)
        parts = (x,) if self.split is None else (x[:, : self.split], x[:, self.split :])
        parts = [chain(part, step) for part, step in zip(parts, self.steps, strict=True)]
        w, x = (made[0], parts[0]) if self.split is None else (torch.cat(made, 1), torch.cat(parts, 1))
        return self.compute(x, w, self.layer.bias)


class Chained:
    """A step that runs as separate operations."""

    def __init__(self, step: Step) -> None:
        self.step = step

    def __call__(self, x: Tensor) -> Tensor:
        return chain(x, self.step)


def naive_network(solver: PrecisionSolver, bits: Bits) -> nn.Module:
    """The network at `bits`, in the naive mode."""
    network = solver.apply(bits)
    for name, layer in solver.layers.items():
        parent, _, leaf = name.rpartition(".")
        setattr(network.get_submodule(parent), leaf, NaiveLayer(layer, bits[name]["w"], bits[name]["a"]))
    for name in solver.attentions:
        processor: Any = network.get_submodule(name).processor
        processor.acts = {gene: None if act is None else Chained(act) for gene, act in processor.acts.items()}
    return network
