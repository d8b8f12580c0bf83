"""Crossover, mutation, selection and repair of genomes, as functions of the random numbers they are given.

A genome is a tuple of whole numbers: for every gene the index of its choice. (AutoDiffusion and TMPQ-DM,
arXiv 2404.09532; Q-DiT, arXiv 2406.17343, algorithm 1.)
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

Genome = tuple[int, ...]
T = TypeVar("T")


def crossover(a: Sequence[T], b: Sequence[T], u: Sequence[float]) -> tuple[T, ...]:
    """Gene i of `a` where u[i] < 0.5, else that of `b`; u is uniform in [0, 1)."""
    return tuple(x if r < 0.5 else y for x, y, r in zip(a, b, u, strict=True))


def mutate(parent: Sequence[T], draws: Sequence[T], u: Sequence[float], probability: float) -> tuple[T, ...]:
    """Gene i redrawn as draws[i] where u[i] < probability."""
    return tuple(new if r < probability else old for old, new, r in zip(parent, draws, u, strict=True))


def keep_best(kept: Sequence[tuple[float, T]], new: Sequence[tuple[float, T]], count: int) -> list[tuple[float, T]]:
    """The `count` smallest of (fitness, item) pairs, best first; on ties the older comes first."""
    return sorted([*kept, *new], key=lambda pair: pair[0])[:count]


def repair(
    genome: Sequence[int], order: Sequence[int], choices: Sequence[int], fits: Callable[[Genome], bool]
) -> tuple[Genome, bool]:
    """The genome with genes moved to later (cheaper) choices until it fits.

    Walks `order` cyclically and raises one gene's index by one wherever it is not the last of its choices; stops as
    soon as the genome fits.

    Args:
        order: gene positions, each once.
        choices: number of choices of every gene, from the most to the least expensive.
        fits: whether a genome is within the budget.

    Returns:
        The genome, and whether it fits: False when every gene is at its cheapest and it still does not.
    """
    current = list(genome)
    while not fits(tuple(current)):
        moved = False
        for position in order:
            if current[position] + 1 < choices[position]:
                current[position] += 1
                moved = True
                if fits(tuple(current)):
                    return tuple(current), True
        if not moved:
            return tuple(current), False
    return tuple(current), True
