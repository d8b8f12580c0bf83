"""Search without retraining: the best bits under a budget, by inference alone (specification of the method, 2.5)."""

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from papercore.errors import InputError

from oneshot_mpq.search import evolution, greedy, ilp
from oneshot_mpq.search.problem import Problem, SearchResult
from oneshot_mpq.supernet import Supernet

__all__ = ["Problem", "SearchResult", "search"]

METHODS = {
    "greedy": greedy.greedy,
    "ilp": ilp.ilp,
    "evolution": evolution.evolution,
    "random": evolution.random,
}


def search(
    net: Supernet,
    calib_loader: Iterable[Any],
    budget: Mapping[str, float],
    method: Literal["greedy", "ilp", "evolution", "random"] = "greedy",
    objective: Literal["loss", "error"] = "loss",
    *,
    respect_frozen: bool = False,
    seed: int = 0,
) -> SearchResult:
    """The best configuration found that costs no more than the budget; the network is set to it.

    Args:
        calib_loader: (image, label) held out from training; read once, the same images for every candidate.
        budget: {"bitops_G": number} or {"size_MiB": number}, fixed layers included.
        objective: mean cross entropy, or top-1 error with the cross entropy deciding ties.
        respect_frozen: use only the weight bits that the training's last scheduler event allows.

    Raises:
        InputError: an unknown method, no image, or a budget that no configuration meets (with what can be reached).
    """
    if method not in METHODS:
        raise InputError("method", found=method, expected=" or ".join(METHODS))
    problem = Problem(net, calib_loader, budget, objective, respect_frozen)
    best = METHODS[method](problem, seed)
    result = problem.result(best, method)
    net.set_bits(result.config)
    return result
