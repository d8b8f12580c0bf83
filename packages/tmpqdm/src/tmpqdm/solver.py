"""The precision solver: one network in which every layer holds a calibrated quantiser for every bit-width.

Interface first; the parts arrive one by one.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import nn

Bits = Mapping[str, Mapping[str, int]]
"""operation -> gene -> bits, for example {"conv_in": {"w": 8, "a": 6}}"""


@dataclasses.dataclass(frozen=True)
class Op:
    """One thing with bits of its own: a layer, or the two products of an attention."""

    name: str
    """module name in the user's model"""
    kind: Literal["layer", "attention"]
    genes: tuple[str, ...]
    """all its tensors with bits, pinned ones too: ("w", "a"), or ("q", "k", "v") and "p" if softmax is searched"""
    pinned: Mapping[str, int]
    """genes whose bits are fixed (a part of `genes`); a search leaves them alone, a plan lists them"""


class PrecisionSolver:
    """A network that switches between bit-widths without quantising anything again."""

    bits: tuple[int, ...]
    """the menu, descending"""
    ops: tuple[Op, ...]
    """in pre-order of the modules; an attention before its own projections"""
    unused: tuple[str, ...]
    """layers that the model never calls: left as they are, no genes"""
    network: nn.Module
    """called exactly as the model; starts in full precision, after `calibrate` at the largest bits"""
    softmax_bits: int | Literal["search"] | None
    """bits of the softmax matrix where it is no gene; None: not quantised (fused attention)"""

    @classmethod
    def from_model(
        cls,
        model: nn.Module,
        *,
        bits: Sequence[int] = (8, 7, 6, 5),
        act_symmetric: bool = True,
        softmax_bits: int | Literal["search"] | None = 8,
        split_shortcuts: bool = True,
        pin: Mapping[str, int | Mapping[str, int]] | None = None,
        example: Any = None,
    ) -> "PrecisionSolver":
        """A solver for a copy of `model`. `example` (x, t) or (x, t, cond) is needed only for models not of diffusers."""
        raise NotImplementedError

    def calibrate(
        self,
        data: Any,
        *,
        method: Literal["adaround", "minmax", "mse"] = "adaround",
        weight_iters: int = 20000,
        act_iters: int = 5000,
        batch_size: int = 32,
        prefix: Literal["same", "mixed"] = "same",
        seed: int = 0,
        progress: Callable[[str], None] | None = None,
        resume: Path | None = None,
    ) -> None:
        """Fits all quantisers on a `CalibrationSet`."""
        raise NotImplementedError

    def set_bits(self, bits: Bits) -> None:
        """Switches the named operations; the others keep their bits. Pinned genes may be given with their own value."""
        raise NotImplementedError

    def set_uniform(self, bits: int) -> None:
        """Every gene that is not pinned to `bits`."""
        raise NotImplementedError

    def uniform(self, bits: int) -> dict[str, dict[str, int]]:
        """The bits that `set_uniform` sets, complete, pinned ones included."""
        raise NotImplementedError

    @contextlib.contextmanager
    def full_precision(self) -> Iterator[nn.Module]:
        """The network without quantisation; the bits come back afterwards."""
        raise NotImplementedError
        yield

    def apply(self, plan: Any) -> nn.Module:
        """A network at the bits of a plan (anything with `.bits`, or a mapping), independent of this solver."""
        raise NotImplementedError

    def save(self, path: Path) -> None: ...

    @classmethod
    def load(cls, path: Path, model: nn.Module) -> "PrecisionSolver":
        raise NotImplementedError
