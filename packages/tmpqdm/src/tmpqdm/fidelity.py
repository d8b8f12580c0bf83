"""Scoring with few pictures first: successive halving, and how far the cheap ranking can be trusted."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import numpy as np
from papercore.errors import InputError

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Rung:
    """One round: `images` pictures for every candidate that was still in."""

    images: int
    values: dict[int, float]
    """candidate's place -> score"""
    correlation: float | None
    """Spearman's, with the round before, over the candidates in both; None with fewer than three"""


@dataclasses.dataclass(frozen=True)
class Halving(Generic[T]):
    """What `successive_halving` found."""

    ranked: list[T]
    """all candidates: by the last round they were in, and by their value there"""
    rungs: list[Rung]


def successive_halving(
    candidates: Sequence[T], score: Callable[[T, int], float], images: Sequence[int], *, keep: float = 0.5
) -> Halving[T]:
    """Scores all with few pictures, a share of the best with more, and so on; only equal numbers are compared.

    Args:
        candidates: at least one.
        score: (candidate, images) -> smaller is better.
        images: ascending numbers of pictures, a round each.
        keep: share that goes on to the next round, rounded up.

    Raises:
        InputError: no candidate, numbers that do not ascend, or a share outside (0, 1].
    """
    if not candidates or not images or any(a >= b for a, b in itertools.pairwise(images)):
        raise InputError("rounds", found=list(images), expected="candidates, and ascending numbers of images")
    if not 0 < keep <= 1:
        raise InputError("keep", found=keep, expected="in (0, 1]")
    alive = list(range(len(candidates)))
    rungs: list[Rung] = []
    done: list[int] = []
    for number in images:
        values = {i: score(candidates[i], number) for i in alive}
        before = rungs[-1].values if rungs else {}
        both = [i for i in alive if i in before]
        correlation = rank_correlation([before[i] for i in both], [values[i] for i in both])
        rungs.append(Rung(number, values, correlation if rungs else None))
        order = sorted(alive, key=lambda i: values[i])
        alive = order[: math.ceil(len(order) * keep)] if number != images[-1] else order
        done = [*order[len(alive) :], *done]
    return Halving([candidates[i] for i in (*alive, *done)], rungs)


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's rank correlation, ties at their mean rank; None with fewer than three pairs or without variation."""
    if len(first) < 3:
        return None
    a, b = (_ranks(np.asarray(values, np.float64)) for values in (first, second))
    if a.std() == 0 or b.std() == 0:
        return None
    return float(np.corrcoef(a, b)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    return (values[:, None] > values).sum(1) + ((values[:, None] == values).sum(1) - 1) / 2
