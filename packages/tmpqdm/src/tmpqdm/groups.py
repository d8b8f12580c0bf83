"""Timestep groups: a sampler visits one timestep of each (TMPQ-DM, arXiv 2404.09532, non-uniform grouping).

Groups are narrow near the image and wide near the noise. The first element of every group is the start candidate of a
search; for quadratic groups that is the usual "quadratic" list of DDIM.
"""

import dataclasses
import itertools
import math
import random
from collections.abc import Sequence

import numpy as np
from papercore.diffusion.sampling import check_timesteps
from papercore.errors import InputError


@dataclasses.dataclass(frozen=True)
class TimestepGroups:
    """Consecutive groups of timesteps; group g holds edges[g], ..., edges[g + 1] - 1.

    Raises:
        InputError: edges that are not ascending whole numbers from 0 to `train_steps`.
    """

    edges: tuple[int, ...]
    """ascending, from 0 to `train_steps`"""
    train_steps: int = 1000
    """T, the length of the training schedule"""

    def __post_init__(self) -> None:
        edges = tuple(int(edge) for edge in self.edges)
        good = len(edges) > 1 and edges[0] == 0 and edges[-1] == self.train_steps
        if not good or any(a >= b for a, b in itertools.pairwise(edges)) or list(edges) != list(self.edges):
            raise InputError(
                "edges of groups", found=list(self.edges), expected=f"ascending whole numbers, 0 to {self.train_steps}"
            )
        object.__setattr__(self, "edges", edges)

    @classmethod
    def quadratic(cls, steps: int, train_steps: int = 1000, *, allow_fewer: bool = False) -> "TimestepGroups":
        """Edges at floor((sqrt(0.8 T) j / (steps - 1))^2), j = 0..steps-1, and T.

        With many steps the first groups fall together.

        Raises:
            InputError: fewer than 2 or more than T steps, or fewer groups than steps without `allow_fewer`.
        """
        _check(steps, train_steps, least=2)
        places = np.linspace(0, math.sqrt(0.8 * train_steps), steps) ** 2
        return cls._of(places.astype(int).tolist(), steps, train_steps, allow_fewer)

    @classmethod
    def uniform(cls, steps: int, train_steps: int = 1000) -> "TimestepGroups":
        """Edges at floor(j T / steps): exactly `steps` groups."""
        _check(steps, train_steps)
        return cls(tuple(j * train_steps // steps for j in range(steps + 1)), train_steps)

    @classmethod
    def solver_grid(cls, steps: int, train_steps: int = 1000, *, allow_fewer: bool = False) -> "TimestepGroups":
        """For solvers that need steps + 1 grid points: edges at floor((sqrt(T) j / (steps + 1))^2), j = 1..steps.

        The lowest point, where sampling stops, is searched too.
        """
        _check(steps, train_steps, most=train_steps - 1)
        places = (np.linspace(0, math.sqrt(train_steps), steps + 2) ** 2)[1:-1]
        return cls._of(places.astype(int).tolist(), steps + 1, train_steps, allow_fewer)

    @classmethod
    def log_snr(cls, steps: int, alphas_cumprod: Sequence[float], *, allow_fewer: bool = False) -> "TimestepGroups":
        """Edges at equal steps of log(a / (1 - a)), a = alphas_cumprod."""
        total = len(alphas_cumprod)
        _check(steps, total)
        values = np.asarray(alphas_cumprod, np.float64)
        if not ((values > 0) & (values < 1)).all() or not (np.diff(values) < 0).all():
            raise InputError("alphas_cumprod", found="not falling in (0, 1)", expected="a noise schedule")
        snr = np.log(values) - np.log1p(-values)
        marks = np.linspace(snr[0], snr[-1], steps + 1)[1:-1]
        return cls._of(np.searchsorted(-snr, -marks).tolist(), steps, total, allow_fewer)

    @classmethod
    def fitted(cls, timesteps: Sequence[int], train_steps: int = 1000) -> "TimestepGroups":
        """A group around every timestep of a given list, with edges half-way between neighbours."""
        check_timesteps(timesteps, train_steps)
        middles = [(a + b + 1) // 2 for a, b in itertools.pairwise(timesteps)]
        return cls((0, *middles, train_steps), train_steps)

    @classmethod
    def _of(cls, inner: Sequence[int], steps: int, train_steps: int, allow_fewer: bool) -> "TimestepGroups":
        edges = tuple(sorted({0, train_steps, *(edge for edge in inner if 0 < edge < train_steps)}))
        if len(edges) - 1 != steps and not allow_fewer:
            raise InputError(
                "groups",
                found=f"{len(edges) - 1} groups for {steps} steps",
                expected="a group a step",
                hint="groups fall together: take fewer steps, or allow_fewer=True",
            )
        return cls(edges, train_steps)

    @property
    def n_groups(self) -> int:
        return len(self.edges) - 1

    @property
    def groups(self) -> tuple[range, ...]:
        """The timesteps of every group."""
        return tuple(range(a, b) for a, b in itertools.pairwise(self.edges))

    def first(self) -> tuple[int, ...]:
        """The first timestep of every group, ascending."""
        return self.edges[:-1]

    def sample(self, rng: random.Random | np.random.Generator) -> tuple[int, ...]:
        """One timestep of every group, uniform in it; ascending by construction."""
        if isinstance(rng, random.Random):
            return tuple(rng.randrange(a, b) for a, b in itertools.pairwise(self.edges))
        return tuple(int(rng.integers(a, b)) for a, b in itertools.pairwise(self.edges))

    def contains(self, timesteps: Sequence[int]) -> bool:
        """Whether the list has one timestep in every group."""
        return len(timesteps) == self.n_groups and all(
            t in group for t, group in zip(timesteps, self.groups, strict=True)
        )

    def log10_size(self) -> float:
        """log10 of how many lists there are with one timestep a group."""
        return sum(math.log10(len(group)) for group in self.groups)

    def log10_unconstrained(self, steps: int | None = None) -> float:
        """log10 of how many lists of `steps` timesteps (None: as many as groups) there are without groups."""
        n, k = self.train_steps, self.n_groups if steps is None else steps
        return (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)) / math.log(10)


def _check(steps: int, train_steps: int, *, least: int = 1, most: int | None = None) -> None:
    most = train_steps if most is None else most
    if train_steps < 1:
        raise InputError("train_steps", found=train_steps, expected="at least 1")
    if not least <= steps <= most:
        raise InputError("steps", found=steps, expected=f"from {least} to {most}")
