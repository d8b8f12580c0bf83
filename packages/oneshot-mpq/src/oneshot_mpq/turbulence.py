"""How much the bit-widths of a layer disturb one another (specification of the method, 2.4)."""

from collections.abc import Iterable, Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from oneshot_mpq.layers import QuantLayer
from oneshot_mpq.lsq import FLOAT, code_range

PROPORTION = 0.25


@torch.no_grad()
def unstable(
    weight: Float[Tensor, "*shape"], step: Tensor, bits: int, proportion: float = PROPORTION
) -> Int[Tensor, ""]:
    """How many weights lie further than (1 - proportion) / 2 of a step from their code's centre, towards another code.

    Clamping first leaves no distance on the side where the grid ends, so one comparison serves both sides.
    """
    low, high = code_range(bits, signed=True)
    position = (weight / step).clamp_(low, high)
    return position.sub_(position.round()).abs_().gt((1 - proportion) / 2).sum()


def turbulence(layer: QuantLayer, bits: Iterable[int] | None = None) -> Float[Tensor, ""]:
    """T(l): mean over the weight bits allowed now of 1/b times the unstable share, in float64.

    Args:
        bits: instead of those allowed now.
    """
    chosen = [b for b in (layer.allowed_weight_bits if bits is None else bits) if b < FLOAT]
    weight = layer.weight.detach()
    steps = layer.weight_quantizer
    total = torch.zeros((), dtype=torch.float64, device=weight.device)
    for b in chosen:
        step = steps.step(b).detach()
        step = step if steps.channels is None else step.reshape(-1, *[1] * (weight.ndim - 1))
        total += unstable(weight, step, b).double() / b
    return total / (len(chosen) * weight.numel()) if chosen else total


class Oscillation:
    """The share of weights whose integer code changed in a step against the direction of its last change.

    (Nagel et al., arXiv 2203.11086.) Averaged exponentially over the steps.

    Args:
        layers: by name.
        bits: the grid that is watched.
        decay: of the average.
    """

    def __init__(self, layers: dict[str, QuantLayer], bits: int, decay: float = 0.99) -> None:
        self.layers = {name: layer for name, layer in layers.items() if bits in layer.weight_choices}
        self.bits, self.decay = bits, decay
        self._codes: dict[str, Tensor] = {}
        self._direction: dict[str, Tensor] = {}
        self._rates: dict[str, Tensor] = {}
        self.steps = 0

    def update(self) -> None:
        """After an optimiser step."""
        for name, layer in self.layers.items():
            codes = layer.weight_quantizer.codes(layer.weight.detach(), self.bits)
            if name not in self._codes:
                self._direction[name] = torch.zeros_like(codes)
                self._rates[name] = torch.zeros((), dtype=torch.float64, device=codes.device)
            else:
                change = (codes - self._codes[name]).sign()
                turned = (change * self._direction[name] < 0).double().mean()
                self._direction[name] = torch.where(change != 0, change, self._direction[name])
                self._rates[name] = self.decay * self._rates[name] + (1 - self.decay) * turned
            self._codes[name] = codes
        self.steps += 1

    def state(self) -> dict[str, Tensor]:
        """For a checkpoint."""
        tensors = {"steps": torch.tensor(self.steps)}
        for kind, values in (("codes", self._codes), ("direction", self._direction), ("rate", self._rates)):
            tensors |= {f"{kind}.{name}": value for name, value in values.items()}
        return tensors

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes back what `state` gave."""
        self.steps = int(tensors["steps"])
        for kind, values in (("codes", self._codes), ("direction", self._direction), ("rate", self._rates)):
            for name, layer in self.layers.items():
                if f"{kind}.{name}" in tensors:
                    values[name] = tensors[f"{kind}.{name}"].to(layer.weight.device)

    def rates(self) -> dict[str, float]:
        """By layer; corrected for the zeros that the average started from."""
        started = 1 - self.decay ** max(1, self.steps - 1)
        return {name: float(rate) / started for name, rate in self._rates.items()}

    def rate(self) -> float:
        """The mean over the layers."""
        rates = self.rates()
        return sum(rates.values()) / max(1, len(rates))
