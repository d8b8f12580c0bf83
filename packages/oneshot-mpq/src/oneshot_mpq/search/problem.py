"""What a search asks: how good is a configuration, and what does it cost?"""

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from papercore.errors import InputError
from papercore.report import Table
from torch import Tensor
from torch.nn import functional

from oneshot_mpq.bitconfig import BitConfig
from oneshot_mpq.cost import UNITS, CostModel, Latency
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
    """configurations measured so far, by this search and by those before it on the same images"""
    log: Table
    """every configuration that was measured, in order"""


def image_key(image: Tensor) -> bytes:
    return hashlib.sha256(image.detach().cpu().contiguous().numpy().tobytes()).digest()


class Images:
    """The images of a search, and what was measured on them.

    Args:
        loader: (images, labels).
        test_loader: images that must not be among them.

    Raises:
        InputError: no image, labels that the network has no class for, or an image of the test data.
    """

    def __init__(self, net: Supernet, loader: Iterable[Any], test_loader: Iterable[Any] | None = None) -> None:
        device = next(net.parameters()).device
        self.batches: list[tuple[Tensor, Tensor]] = [(x.to(device), y.to(device)) for x, y, *_ in loader]
        self.count = sum(len(y) for _, y in self.batches)
        if not self.count:
            raise InputError("calib_loader", found="no image", expected="at least one")
        if test_loader is not None:
            keys = {image_key(image) for x, _ in self.batches for image in x}
            shared = sum(image_key(image) in keys for x, *_ in test_loader for image in x)
            if shared:
                raise InputError(
                    "calib_loader",
                    found=f"{shared} images of the test data",
                    expected="none: what is searched on cannot judge the result",
                )
        self.measured: dict[Bits, tuple[float, float]] = {}
        """loss and error (%)"""

    def digest(self) -> str:
        found = hashlib.sha256()
        for x, y in self.batches:
            found.update(image_key(x) + image_key(y))
        return found.hexdigest()[:16]


class Problem:
    """Candidates, costs and measurements of one search. Batch norms use the statistics of the batch.

    Raises:
        InputError: the objective, or the budget: its unit, or a number that no configuration reaches.
    """

    def __init__(
        self,
        net: Supernet,
        images: Images,
        budget: Mapping[str, float],
        objective: str,
        respect_frozen: bool = False,
        latency: Latency | None = None,
    ) -> None:
        if len(budget) != 1 or not set(budget) <= set(UNITS):
            raise InputError("budget", found=dict(budget), expected=f"{' or '.join(UNITS)}, and a number")
        if objective not in ("loss", "error"):
            raise InputError("objective", found=objective, expected="loss or error")
        self.net, self.images, self.objective = net, images, objective
        self.measured = images.measured
        ((self.unit, self.budget),) = budget.items()
        self.choices: list[tuple[int, ...]] = []
        for layer in net.layers.values():
            self.choices += [layer.allowed_weight_bits if respect_frozen else layer.weight_choices, layer.act_choices]
        self.costs = CostModel(net, latency)
        self.offset = self.costs.fixed_part(self.unit)
        cheapest, most = [], self.offset
        for i in range(len(net.layers)):
            pairs = [(w, a) for w in self.choices[2 * i] for a in self.choices[2 * i + 1]]
            cheapest += min(pairs, key=lambda pair, i=i: self.layer_cost(i, *pair))
            most += max(self.layer_cost(i, *pair) for pair in pairs)
        self.highest = tuple(c[-1] for c in self.choices)
        self.cheapest = tuple(cheapest)
        """for a latency table these need not be the fewest bits"""
        least = self.cost(self.cheapest)
        if not least * (1 - 1e-12) <= self.budget <= most * (1 + 1e-12):
            raise InputError(f"budget {self.unit}", found=self.budget, expected=f"{least:.6g} to {most:.6g}")

    @staticmethod
    def bits(weight_bits: Sequence[int], act_bits: Sequence[int]) -> Bits:
        return tuple(b for pair in zip(weight_bits, act_bits, strict=True) for b in pair)

    @staticmethod
    def described(bits: Bits) -> str:
        return " ".join(f"{w}/{a}" for w, a in zip(bits[::2], bits[1::2], strict=True))

    def layer_cost(self, layer: int, weight_bits: int, act_bits: int) -> float:
        """What a layer adds, in the budget's unit."""
        return self.costs.layer(self.unit, layer, weight_bits, act_bits)

    def cost(self, bits: Bits) -> float:
        return self.offset + sum(
            self.layer_cost(i, w, a) for i, (w, a) in enumerate(zip(bits[::2], bits[1::2], strict=True))
        )

    def fits(self, bits: Bits) -> bool:
        """Whether it keeps the budget; rounding of the sum is forgiven."""
        return self.cost(bits) <= self.budget * (1 + 1e-12)

    @torch.no_grad()
    def _on(self, bits: Bits, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[float, int]:
        """Sum of the cross entropies, and number of wrong images."""
        self.net.select(bits[::2], bits[1::2])
        loss, wrong = 0.0, 0
        with batch_statistics(self.net):
            for x, y in batches:
                logits = self.net(x).float()
                if logits.ndim != 2 or int(y.max()) >= logits.shape[1] or int(y.min()) < 0:
                    raise InputError(
                        "labels of calib_loader",
                        found=f"{int(y.min())} to {int(y.max())}",
                        expected=f"0 to {logits.shape[-1] - 1}, the classifier's classes",
                    )
                loss += float(functional.cross_entropy(logits, y, reduction="sum"))
                wrong += int((logits.argmax(-1) != y).sum())
        return loss, wrong

    def measure(self, bits: Bits) -> tuple[float, float]:
        """What is minimised, smaller is better: (loss, error) or (error, loss), means over the search images."""
        if bits not in self.measured:
            loss, wrong = self._on(bits, self.images.batches)
            self.measured[bits] = (loss / self.images.count, 100 * wrong / self.images.count)
        loss, error = self.measured[bits]
        return (loss, error) if self.objective == "loss" else (error, loss)

    def error_on(self, batch: int, bits: Bits) -> float:
        """Share of wrong images in one batch, counted round and round."""
        x, y = self.images.batches[batch % len(self.images.batches)]
        return self._on(bits, [(x, y)])[1] / len(y)

    def best(self, candidates: Sequence[Bits]) -> Bits:
        """The best of those that fit; the first one wins ties."""
        return min((c for c in candidates if self.fits(c)), key=self.measure)

    def result(self, bits: Bits, method: str) -> SearchResult:
        self.measure(bits)
        loss, error = self.measured[bits]
        metrics = {"search_loss": loss, "search_error": error, "method": method}
        if self.unit == "latency_ms":
            metrics["latency_ms"] = self.cost(bits)
        config = BitConfig.of(self.net, bits[::2], bits[1::2], metrics=metrics)
        rows = [(self.described(b), self.cost(b), *values) for b, values in self.measured.items()]
        log = Table("measured configurations", ("weight/activation bits", self.unit, "loss", "error (%)"), rows)
        return SearchResult(config, method, len(self.measured), log)
