"""The exact optimum of an additive surrogate, then a true comparison of the best few."""

import itertools

import numpy as np
from papercore.errors import WorkError
from scipy.optimize import Bounds, LinearConstraint, milp

from oneshot_mpq.search.problem import Bits, Problem

FINALISTS = 5


def ilp(problem: Problem, seed: int = 0) -> Bits:
    """Every layer's every pair is measured alone, the others at the most bits; the sum of the increases is minimised
    under the budget. The optimum, and the next best ones, are then measured as they are."""
    base = problem.measure(problem.highest)[0]
    layers: list[list[tuple[int, int]]] = []
    increase: list[float] = []
    for i in range(0, len(problem.choices), 2):
        layers.append([(w, a) for w in problem.choices[i] for a in problem.choices[i + 1]])
        for pair in layers[-1]:
            bits = (*problem.highest[:i], *pair, *problem.highest[i + 2 :])
            increase.append(problem.measure(bits)[0] - base)
    costs = [problem.layer_cost(i, *pair) for i, pairs in enumerate(layers) for pair in pairs]
    starts = np.cumsum([0, *map(len, layers)])
    one_each = np.zeros((len(layers), len(costs)))
    for i, (begin, end) in enumerate(itertools.pairwise(starts)):
        one_each[i, begin:end] = 1
    room = problem.budget - problem.offset
    constraints = [LinearConstraint(one_each, 1, 1), LinearConstraint(np.array([costs]) / room, -np.inf, 1 + 1e-12)]
    found: list[Bits] = []
    for _ in range(FINALISTS):
        solution = milp(
            np.array(increase), integrality=np.ones(len(costs)), bounds=Bounds(0, 1), constraints=constraints
        )
        if solution.x is None:
            break
        chosen = np.flatnonzero(solution.x > 0.5)
        pairs = [layers[i][k - starts[i]] for i, k in enumerate(chosen)]
        found.append(tuple(b for pair in pairs for b in pair))
        cut = np.zeros((1, len(costs)))
        cut[0, chosen] = 1
        constraints.append(LinearConstraint(cut, -np.inf, len(layers) - 1))  # not this one again
    fitting = [bits for bits in found if problem.fits(bits)]
    if not fitting:
        raise WorkError(f"the integer programme has no solution at {problem.unit} {problem.budget}")
    return problem.best(fitting)
