"""Evolutionary search over discrete genes under a budget: pure operators, and a sampler for Optuna."""

from papercore.search.operators import Genome, crossover, keep_best, mutate, repair
from papercore.search.sampler import Evaluation, EvolutionSampler, Space, open_study, run_search

__all__ = [
    "Evaluation",
    "EvolutionSampler",
    "Genome",
    "Space",
    "crossover",
    "keep_best",
    "mutate",
    "open_study",
    "repair",
    "run_search",
]
