"""What comes out of the searchable layers (after their batch norm), kept when it is asked for."""

from collections.abc import Iterable

from torch import Tensor


class Features:
    """Outputs by layer name; only the names in `wanted` are kept."""

    def __init__(self) -> None:
        self.wanted: frozenset[str] = frozenset()
        self.kept: dict[str, Tensor] = {}

    def want(self, names: Iterable[str]) -> None:
        """Keeps these from now on, and forgets the others."""
        self.wanted, self.kept = frozenset(names), {}

    def take(self, name: str, value: Tensor) -> None:
        if name in self.wanted:
            self.kept[name] = value

    def collect(self) -> dict[str, Tensor]:
        """What was kept; nothing is kept any more."""
        kept = self.kept
        self.want(())
        return kept
