"""Random search, and the evolutionary one of SPOS (arXiv 1904.00420): population 50, 25 mutations, 25 crossovers."""

import numpy as np

from oneshot_mpq.search.problem import Bits, Problem

POPULATION, MUTATIONS, CROSSOVERS, GENERATIONS, RATE = 50, 25, 25, 20, 0.2


def lowered(problem: Problem, bits: Bits, generator: np.random.Generator) -> Bits:
    """Bits taken away one by one, each time from a random tensor, until the budget is kept."""
    while not problem.fits(bits):
        possible = [i for i, choices in enumerate(problem.choices) if bits[i] > choices[0]]
        i = int(generator.choice(possible))
        choices = problem.choices[i]
        bits = (*bits[:i], choices[choices.index(bits[i]) - 1], *bits[i + 1 :])
    return bits


def draw(problem: Problem, generator: np.random.Generator) -> Bits:
    """A random configuration that keeps the budget."""
    return lowered(problem, tuple(int(generator.choice(choices)) for choices in problem.choices), generator)


def random(problem: Problem, seed: int = 0) -> Bits:
    """The best of as many random configurations as the evolution measures at most."""
    generator = np.random.default_rng(seed)
    return problem.best([draw(problem, generator) for _ in range(POPULATION + GENERATIONS * (MUTATIONS + CROSSOVERS))])


def evolution(problem: Problem, seed: int = 0) -> Bits:
    """Every generation: the best, changed at a share of the places, and mixed two by two."""
    generator = np.random.default_rng(seed)
    population = [draw(problem, generator) for _ in range(POPULATION)]
    for _ in range(GENERATIONS):
        parents = sorted(set(population), key=problem.measure)[: POPULATION // 2]
        children = []
        for _ in range(MUTATIONS):
            parent = parents[int(generator.integers(len(parents)))]
            child = tuple(
                int(generator.choice(choices)) if generator.random() < RATE else b
                for b, choices in zip(parent, problem.choices, strict=True)
            )
            children.append(lowered(problem, child, generator))
        for _ in range(CROSSOVERS):
            first, second = (parents[int(generator.integers(len(parents)))] for _ in range(2))
            mixed = tuple(a if generator.random() < 0.5 else b for a, b in zip(first, second, strict=True))
            children.append(lowered(problem, mixed, generator))
        population = [*parents, *children]
    return problem.best(population)
