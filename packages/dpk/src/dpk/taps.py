"""Feature taps: found by name or automatically, read with hooks, as maps [B, C, H, W]."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from dpk.method import FeatureInfo, Pair


class Taps:
    """Taps of one network: `with taps.capture() as features:` fills the list during the network's call."""

    infos: list[FeatureInfo]

    @contextmanager
    def capture(self) -> Iterator[list[Tensor]]:
        raise NotImplementedError
        yield []


def auto_pairs(student: nn.Module, teacher: nn.Module, example: Tensor, stages: int | str) -> list[Pair]:
    """The deepest stages of equal stride."""
    raise NotImplementedError
