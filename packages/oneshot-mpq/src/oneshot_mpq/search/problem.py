"""What a search asks: how good is a configuration, and what does it cost?"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from papercore.errors import InputError
from papercore.report import Table
from torch import Tensor
from torch.nn import functional

from oneshot_mpq.bitconfig import BitConfig
from oneshot_mpq.supernet import Supernet
from oneshot_mpq.validation import batch_statistics

Bits = tuple[int, ...]
"""weight and activation bits of every layer, one after the other"""


@dataclasses.dataclass(frozen=True)
class SearchResult:
    """What was found."""

    config: BitConfig
    """with its costs, and loss and error on the search images as metrics"""
    method: str
    evaluations: int
    log: Table
    """every configuration that was measured, in order"""


class Problem:
    """Candidates, costs and measurements of one search. Batch norms use the statistics of the batch."""

    def __init__(
        self,
        net: Supernet,
        loader: Iterable[Any],
        budget: Mapping[str, float],
        objective: str,
        respect_frozen: bool,
    ) -> None:
        if set(budget) not in ({"bitops_G"}, {"size_MiB"}):
            raise InputError("budget", found=dict(budget), expected="bitops_G or size_MiB and a number")
        if objective not in ("loss", "error"):
            raise InputError("objective", found=objective, expected="loss or error")
        self.net, self.objective = net, objective
        (self.unit, self.budget), *_ = budget.items()
        device = next(net.parameters()).device
        self.batches: list[tuple[Tensor, Tensor]] = [(x.to(device), y.to(device)) for x, y in loader]
        self.count = sum(len(y) for _, y in self.batches)
        if not self.count:
            raise InputError("calib_loader", found="no image", expected="at least one")
        self.choices: list[tuple[int, ...]] = []
        for layer in net.layers.values():
            self.choices += [layer.allowed_weight_bits if respect_frozen else layer.weight_choices, layer.act_choices]
        self.macs = np.array([net.macs[name] for name in net.layers], np.int64)
        self.weights = np.array([layer.weight.numel() for layer in net.layers.values()], np.int64)
        lowest, highest = (tuple(c[i] for c in self.choices) for i in (0, -1))
        self.offset = 0.0
        self.offset = self._exact(lowest) - self.cost(lowest)
        least, most = self.cost(lowest), self.cost(highest)
        if not least <= self.budget:
            raise InputError(f"budget {self.unit}", found=self.budget, expected=f"{least:.6g} to {most:.6g}")
        self.lowest, self.highest = lowest, highest
        self.measured: dict[Bits, tuple[float, float]] = {}

    def _exact(self, bits: Bits) -> float:
        cost = self.net.cost(self.config(bits))
        return cost.bitops_G if self.unit == "bitops_G" else cost.size_MiB

    def config(self, bits: Bits) -> BitConfig:
        return BitConfig.of(self.net, bits[::2], bits[1::2])

    def layer_cost(self, layer: int, weight_bits: int, act_bits: int) -> float:
        """What a layer adds, in the budget's unit."""
        if self.unit == "bitops_G":
            return int(self.macs[layer]) * weight_bits * act_bits / 1e9
        return int(self.weights[layer]) * weight_bits / 8 / 2**20

    def cost(self, bits: Bits) -> float:
        return self.offset + sum(
            self.layer_cost(i, w, a) for i, (w, a) in enumerate(zip(bits[::2], bits[1::2], strict=True))
        )

    def fits(self, bits: Bits) -> bool:
        """Whether it keeps the budget; rounding of the sum is forgiven."""
        return self.cost(bits) <= self.budget * (1 + 1e-12)

    @torch.no_grad()
    def measure(self, bits: Bits) -> tuple[float, float]:
        """What is minimised, smaller is better: (loss, error) or (error, loss), means over the search images."""
        if bits not in self.measured:
            self.net.select(bits[::2], bits[1::2])
            loss, wrong = 0.0, 0
            with batch_statistics(self.net):
                for x, y in self.batches:
                    logits = self.net(x).float()
                    loss += float(functional.cross_entropy(logits, y, reduction="sum"))
                    wrong += int((logits.argmax(-1) != y).sum())
            self.measured[bits] = (loss / self.count, 100 * wrong / self.count)
        loss, error = self.measured[bits]
        return (loss, error) if self.objective == "loss" else (error, loss)

    def best(self, candidates: Sequence[Bits]) -> Bits:
        """The best of those that fit; the first one wins ties."""
        return min((c for c in candidates if self.fits(c)), key=self.measure)

    def result(self, bits: Bits, method: str) -> SearchResult:
        self.measure(bits)
        loss, error = self.measured[bits]
        config = BitConfig.of(
            self.net, bits[::2], bits[1::2], metrics={"search_loss": loss, "search_error": error, "method": method}
        )
        rows = [
            (" ".join(f"{w}/{a}" for w, a in zip(b[::2], b[1::2], strict=True)), self.cost(b), *values)
            for b, values in self.measured.items()
        ]
        log = Table("measured configurations", ("weight/activation bits", self.unit, "loss", "error (%)"), rows)
        return SearchResult(config, method, len(self.measured), log)
