"""Which layers may use their lowest weight bit, and when that is decided anew (specification of the method, 2.4)."""

import dataclasses
import math

from papercore.errors import InputError

from oneshot_mpq.supernet import Supernet
from oneshot_mpq.turbulence import turbulence


@dataclasses.dataclass(frozen=True)
class FreezeScheduler:
    """At its events the most turbulent layers lose their lowest weight bit and all others get it back.

    Nothing but the epoch and the weights decides, so that there is no state beside the candidate sets themselves.

    Args:
        epochs: of the whole training, E.
        start: no event up to this epoch (counted from 0).
        first, last: share of the layers that is frozen at the beginning and at the end.
    """

    epochs: int
    start: int = 5
    first: float = 0.5
    last: float = 0.2

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise InputError("epochs", found=self.epochs, expected="at least 1")
        for name in ("first", "last"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(name, found=getattr(self, name), expected="a share in [0, 1]")

    def due(self, epoch: int) -> bool:
        """Whether the candidate sets are decided at the start of this epoch (counted from 0)."""
        period = 2 if epoch <= math.floor(0.72 * self.epochs) else 15
        return epoch > self.start and (epoch + 1) % period == 0

    def ratio(self, epoch: int) -> float:
        """The share of layers to freeze."""
        position, whole = (epoch - 5) // 2, self.epochs // 2
        return self.last + 0.5 * (self.first - self.last) * (1 + math.cos(math.pi * position / whole))

    def events(self) -> list[tuple[int, float]]:
        """(epoch, ratio) of the whole training."""
        return [(epoch, self.ratio(epoch)) for epoch in range(self.epochs) if self.due(epoch)]

    def update(self, net: Supernet, epoch: int) -> dict[str, float]:
        """Decides at epoch `epoch`; gives the turbulence of every layer as it was before."""
        return self.freeze(net, self.ratio(epoch))

    @staticmethod
    def freeze(net: Supernet, ratio: float) -> dict[str, float]:
        """Freezes a share of the layers (the first ones win ties), thaws the others."""
        metric = {name: float(turbulence(layer)) for name, layer in net.layers.items()}
        count = math.floor(ratio * len(metric))
        frozen = set(sorted(metric, key=lambda name: -metric[name])[:count])
        for name, layer in net.layers.items():
            full = layer.weight_choices
            layer.allow(full[1:] if name in frozen and len(full) > 1 else full)
        return metric


@dataclasses.dataclass(frozen=True)
class Dampening:
    """Weight of the oscillation dampening: a cosine from 0 up to `largest`.

    Args:
        epochs: of the whole training.
        steps_per_epoch: optimiser steps.
        largest: at the end.
        start: epoch at which the rise begins; the term itself is used after that epoch.
    """

    epochs: int
    steps_per_epoch: int
    largest: float = 0.1
    start: int = 40

    def weight(self, step: int) -> float:
        """At an optimiser step."""
        begin, end = self.start * self.steps_per_epoch, self.epochs * self.steps_per_epoch
        if step < begin or end <= begin:
            return 0.0
        return 0.5 * self.largest * (1 - math.cos(math.pi * (step - begin) / (end - begin)))

    def active(self, step: int) -> bool:
        return self.largest > 0 and step // self.steps_per_epoch > self.start
