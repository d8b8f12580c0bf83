"""Ranges of activations over a whole calibration set: extremes, running means of them, or a search for the best."""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from papercore.quant import RangeObserver
from torch import Tensor

from tmpqdm.attention import QuantAttention
from tmpqdm.layers import QuantLayer
from tmpqdm.quantisers import SHRINKS, Step, range_parameters

RangeMethod = Literal["max", "mse", "running"]
MOMENTUM = 0.95
"""of the running range"""

LOOKED_AT = 2**14
"""values of a tensor and minibatch that the search for the best range tries"""

Place = tuple[str, str]
"""(operation, gene)"""


class Extremes:
    """Looks at what passes, and lets it pass: smallest and largest value, of two parts along dimension 1 if split."""

    def __init__(self, split: int | None, symmetric: bool, running: bool) -> None:
        self.split, self.symmetric = split, symmetric
        self.low: list[Tensor | None] = [None] * (1 if split is None else 2)
        self.high: list[Tensor | None] = list(self.low)
        self.running = [RangeObserver(8, None, 1 - MOMENTUM) for _ in self.low] if running else []

    def parts(self, x: Tensor) -> tuple[Tensor, ...]:
        return (x,) if self.split is None else (x[:, : self.split], x[:, self.split :])

    def __call__(self, x: Tensor) -> Tensor:
        for i, part in enumerate(self.parts(x)):
            if self.running:
                self.running[i].update(part.reshape(1, -1))
                self.low[i], self.high[i] = self.running[i].low, self.running[i].high
                continue
            low, high = part.aminmax()
            before, above = self.low[i], self.high[i]
            self.low[i] = low if before is None else torch.minimum(low, before)
            self.high[i] = high if above is None else torch.maximum(high, above)
        return x

    def steps(self, bits: int) -> tuple[Step, ...]:
        """The quantisers of these ranges; of a tensor that was never seen, those of zeros."""
        zero = torch.zeros(())
        found = []
        for low, high in zip(self.low, self.high, strict=True):
            ends = (zero, zero) if low is None or high is None else (low.reshape(()), high.reshape(()))
            delta, point = range_parameters(*ends, bits, symmetric=self.symmetric)
            found.append(Step(delta, point, bits, self.symmetric))
        return tuple(found)


class BestShrink:
    """Sums |x - x'|^2.4 for every width and every shrunk range; the first smallest wins.

    Of every minibatch at most `LOOKED_AT` values are tried, drawn with a fixed seed.
    """

    def __init__(self, extremes: Extremes, widths: Sequence[int]) -> None:
        self.extremes = extremes
        self.tried: dict[tuple[int, int], list[Step]] = {}
        self.errors: dict[tuple[int, int], Tensor] = {}
        self.generator = torch.Generator().manual_seed(0)
        for width in widths:
            for half, (low, high) in enumerate(zip(extremes.low, extremes.high, strict=True)):
                if low is None or high is None:
                    continue
                steps = []
                for i in range(SHRINKS[0]):
                    r = 1 - SHRINKS[1] * i
                    delta, zero = range_parameters(low * r, high * r, width, symmetric=extremes.symmetric)
                    steps.append(Step(delta, zero, width, extremes.symmetric))
                self.tried[width, half] = steps
                self.errors[width, half] = torch.zeros(len(steps), dtype=torch.float64, device=low.device)

    def __call__(self, x: Tensor) -> Tensor:
        parts = [self._some(part.detach().float().reshape(-1)) for part in self.extremes.parts(x)]
        for (width, half), steps in self.tried.items():
            part = parts[half]
            self.errors[width, half] += torch.stack([(part - step(part)).abs().pow(2.4).sum() for step in steps])
        return x

    def _some(self, values: Tensor) -> Tensor:
        if len(values) <= LOOKED_AT:
            return values
        return values[torch.randint(len(values), (LOOKED_AT,), generator=self.generator).to(values.device)]

    def steps(self, bits: int) -> tuple[Step, ...]:
        plain = self.extremes.steps(bits)
        return tuple(
            self.tried[bits, half][int(self.errors[bits, half].argmin())] if (bits, half) in self.tried else plain[half]
            for half in range(len(plain))
        )


def fit_ranges(
    layers: Mapping[str, QuantLayer],
    attentions: Mapping[str, QuantAttention],
    widths: Mapping[Place, Sequence[int]],
    run: Callable[[], None],
    *,
    symmetric: bool,
    method: RangeMethod,
) -> None:
    """Sets every activation quantiser from the network's full-precision activations.

    Args:
        widths: of every (operation, gene), gene "a" of a layer and "q", "k", "v", "p" of an attention.
        run: sends the whole calibration set through the network.
    """
    places: dict[Place, Extremes] = {}
    for name, layer in layers.items():
        layer.use()
        places[name, "a"] = Extremes(layer.split, symmetric, method == "running")
    for name, attention in attentions.items():
        for gene in attention.genes:  # the softmax matrix is never negative: its zero point is 0 by itself
            places[name, gene] = Extremes(None, symmetric and gene != "p", method == "running")
    _observe(layers, attentions, places, run)
    found: Mapping[Place, Extremes | BestShrink] = places
    if method == "mse":
        found = {place: BestShrink(extremes, widths[place]) for place, extremes in places.items()}
        _observe(layers, attentions, found, run)
    for (name, gene), observer in found.items():
        for bits in widths[name, gene]:
            steps = observer.steps(bits)
            if gene == "a":
                layers[name].set_steps(tuple(step.to(layers[name].weight.device) for step in steps))
            else:
                attentions[name].steps[gene][bits] = steps[0]


def _observe(
    layers: Mapping[str, QuantLayer],
    attentions: Mapping[str, QuantAttention],
    observers: Mapping[Place, Callable[[Tensor], Tensor]],
    run: Callable[[], None],
) -> None:
    try:
        for name, layer in layers.items():
            layer.use()
            layer.act = observers[name, "a"]
        for name, attention in attentions.items():
            for gene in attention.genes:
                attention.acts[gene] = observers[name, gene]
        with torch.no_grad():
            run()
    finally:
        for layer in layers.values():
            layer.use()
        for attention in attentions.values():
            attention.use(**dict.fromkeys(attention.genes))
