"""The exact optimum of an additive surrogate, then a true comparison of the best few."""

import itertools
from collections.abc import Sequence

import numpy as np
from papercore.errors import WorkError
from scipy.optimize import Bounds, LinearConstraint, milp

from oneshot_mpq.search.problem import Bits, Problem

FINALISTS = 5


def cheapest_pairs(
    increase: Sequence[Sequence[float]], costs: Sequence[Sequence[float]], room: float, count: int
) -> list[tuple[int, ...]]:
    """Up to `count` choices of one entry a layer, costing at most `room`, of the smallest total increase, best first.

    Solved exactly (gap 0); each next solution by excluding the ones before.
    """
    starts = np.cumsum([0, *map(len, costs)])
    total = int(starts[-1])
    values = np.concatenate([np.asarray(layer, float) for layer in increase])
    prices = np.concatenate([np.asarray(layer, float) for layer in costs])
    one_each = np.zeros((len(costs), total))
    for i, (begin, end) in enumerate(itertools.pairwise(starts)):
        one_each[i, begin:end] = 1
    constraints = [LinearConstraint(one_each, 1, 1), LinearConstraint(prices[None] / room, -np.inf, 1 + 1e-12)]
    spread = float(np.ptp(values)) or 1.0  # the solver's tolerances are absolute
    found: list[tuple[int, ...]] = []
    for _ in range(count):
        solution = milp(
            values / spread,
            integrality=np.ones(total),
            bounds=Bounds(0, 1),
            constraints=constraints,
            options={"mip_rel_gap": 0},
        )
        if solution.x is None:
            break
        chosen = np.flatnonzero(solution.x > 0.5)
        found.append(tuple(int(k - begin) for k, begin in zip(chosen, starts[:-1], strict=True)))
        cut = np.zeros((1, total))
        cut[0, chosen] = 1
        constraints.append(LinearConstraint(cut, -np.inf, len(costs) - 1))  # not this one again
    return found


def ilp(problem: Problem, seed: int = 0) -> Bits:
    """Every layer's every pair is measured alone, the others at the most bits; the sum of the increases is minimised
    under the budget. The optimum, and the next best ones, are then measured as they are."""
    base = problem.measure(problem.highest)[0]
    layers: list[list[tuple[int, int]]] = []
    increase: list[list[float]] = []
    for i in range(0, len(problem.choices), 2):
        layers.append([(w, a) for w in problem.choices[i] for a in problem.choices[i + 1]])
        alone = [(*problem.highest[:i], *pair, *problem.highest[i + 2 :]) for pair in layers[-1]]
        increase.append([problem.measure(bits)[0] - base for bits in alone])
    costs = [[problem.layer_cost(i, *pair) for pair in pairs] for i, pairs in enumerate(layers)]
    best = cheapest_pairs(increase, costs, problem.budget - problem.offset, FINALISTS)
    found = [tuple(b for pairs, k in zip(layers, choice, strict=True) for b in pairs[k]) for choice in best]
    fitting = [bits for bits in found if problem.fits(bits)]
    if not fitting:
        raise WorkError(f"the integer programme has no solution at {problem.unit} {problem.budget}")
    return problem.best(fitting)
