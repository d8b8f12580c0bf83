"""Calibration data: the inputs the network sees along real sampling trajectories (interface first)."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class CalibrationSet:
    x: Tensor
    """[n, C, H, W]"""
    t: Tensor
    """[n] timesteps"""
    cond: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    """keyword arguments of the model, one row a sample"""

    def save(self, path: Path) -> None: ...

    @classmethod
    def load(cls, path: Path) -> "CalibrationSet":
        raise NotImplementedError

    def validate(self, model: nn.Module | None = None, *, train_steps: int = 1000, batch_size: int = 1) -> None: ...


def collect_calibration(
    model: nn.Module,
    scheduler: Any,
    *,
    samples: int = 32,
    steps: int = 100,
    use: int = 20,
    seed: int = 0,
    timesteps: Sequence[int] | None = None,
    labels: Sequence[int] | None = None,
    cond: Mapping[str, Tensor] | None = None,
    uncond: Mapping[str, Tensor] | None = None,
    guidance: float | None = None,
    shape: tuple[int, int, int] | None = None,
) -> CalibrationSet:
    """Runs the full-precision model down `steps` DDIM steps and keeps the inputs of `use` of them.

    `timesteps` may also be timestep groups (anything with `.sample(rng)`): every few samples then follow a list drawn
    from the groups, and every visited step is kept.
    """
    raise NotImplementedError
