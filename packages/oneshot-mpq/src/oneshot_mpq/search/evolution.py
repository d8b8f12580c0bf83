"""Random search, and the evolutionary one of SPOS (arXiv 1904.00420): population 50, 25 mutations, 25 crossovers."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from papercore.search import EvolutionSampler, Genome, Space, open_study, run_search

from oneshot_mpq.search.problem import Bits, Problem
from oneshot_mpq.supernet import Supernet

POPULATION, PARENTS, RATE = 50, 25, 0.2
EVALUATIONS = 1000
"""20 generations"""


def lowered(problem: Problem, bits: Bits, generator: np.random.Generator) -> Bits:
    """Bits taken away one by one, each time from a random tensor, until the budget is kept."""
    while not problem.fits(bits):
        possible = [i for i, choices in enumerate(problem.choices) if bits[i] > choices[0]]
        if not possible:
            return problem.cheapest
        i = int(generator.choice(possible))
        choices = problem.choices[i]
        bits = (*bits[:i], choices[choices.index(bits[i]) - 1], *bits[i + 1 :])
    return bits


def draw(problem: Problem, generator: np.random.Generator) -> Bits:
    """A random configuration that keeps the budget."""
    return lowered(problem, tuple(int(generator.choice(choices)) for choices in problem.choices), generator)


def random(problem: Problem, seed: int = 0, evaluations: int = EVALUATIONS) -> Bits:
    """The best of so many random configurations."""
    generator = np.random.default_rng(seed)
    return problem.best([draw(problem, generator) for _ in range(evaluations)])


def evolution(
    problem: Problem,
    seed: int = 0,
    evaluations: int = EVALUATIONS,
    storage: str | Path | None = None,
    *,
    alone: bool = True,
) -> Bits:
    """Half of every generation mixes two of the best, the other half changes one at a share of the places.

    Args:
        storage: Optuna's; nothing: memory.
        alone: whether no other process works on the storage.

    Raises:
        InputError: the storage holds another search.
    """
    # a gene a layer: its pairs from the dearest to the cheapest, which need not be the order of their bits
    pairs: list[list[tuple[int, int]]] = []
    for i in range(len(problem.net.layers)):
        possible = [(w, a) for w in problem.choices[2 * i] for a in problem.choices[2 * i + 1]]
        pairs.append(sorted(possible, key=lambda pair, i=i: (-problem.layer_cost(i, *pair), -sum(pair))))
    genes = {name: [f"W{w}A{a}" for w, a in possible] for name, possible in zip(problem.net.layers, pairs, strict=True)}

    def bits(genome: Genome) -> Bits:
        return tuple(b for possible, i in zip(pairs, genome, strict=True) for b in possible[i])

    def evaluate(genome: Genome) -> tuple[float, dict[str, Any]]:
        value = problem.measure(bits(genome))[0]
        loss, error = problem.measured[bits(genome)]
        return value, {"loss": loss, "error": error}

    space = Space(genes, fits=lambda genome: problem.fits(bits(genome)))
    sampler = EvolutionSampler(space, population=POPULATION, top_k=PARENTS, mutation=RATE, seed=seed)
    study = open_study(storage, f"{problem.unit} {problem.budget:.9g}", sampler, alone=alone)
    description = {
        "model": problem.net.name,
        "genes": genes,
        "budget": [problem.unit, problem.budget],
        "objective": problem.objective,
        "images": problem.images.digest(),
        "weights": digest(problem.net),
        "seed": seed,
    }
    label = f"search, {problem.unit} {problem.budget:.4g}"
    found = run_search(study, sampler, evaluate, evaluations, description=description, alone=alone, label=label)
    for evaluation in found:  # those of other processes and earlier runs
        problem.measured.setdefault(bits(evaluation.genome), (evaluation.notes["loss"], evaluation.notes["error"]))
    return problem.best([bits(evaluation.genome) for evaluation in found])


def digest(net: Supernet) -> str:
    """Of the parameters: what was measured holds for these weights and steps alone."""
    found = hashlib.sha256()
    for parameter in net.parameters():
        found.update(parameter.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]
