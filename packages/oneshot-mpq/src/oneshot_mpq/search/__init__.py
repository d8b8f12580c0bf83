"""Search without retraining: the best bits under a budget, by inference alone (specification of the method, 2.5)."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from papercore.errors import InputError
from papercore.report import Table

from oneshot_mpq.cost import Latency
from oneshot_mpq.search import evolution, greedy, ilp
from oneshot_mpq.search.compatible import original
from oneshot_mpq.search.problem import Images, Problem, SearchResult
from oneshot_mpq.supernet import Supernet

__all__ = ["Front", "Problem", "SearchResult", "search", "search_front"]

METHODS = ("greedy", "ilp", "evolution", "random")
Method = Literal["greedy", "ilp", "evolution", "random"]


@dataclasses.dataclass(frozen=True)
class Front:
    """Of several budgets in one unit."""

    results: tuple[SearchResult, ...]
    """in the order of the budgets"""
    table: Table
    """all measured configurations that no other one beats in cost and objective at once, cheapest first"""


def search(
    net: Supernet,
    calib_loader: Iterable[Any],
    budget: Mapping[str, float],
    method: Method = "greedy",
    objective: Literal["loss", "error"] = "loss",
    *,
    compat: Literal["reference"] | None = None,
    respect_frozen: bool = False,
    latency: Latency | None = None,
    evaluations: int = evolution.EVALUATIONS,
    storage: str | Path | None = None,
    alone: bool = True,
    test_loader: Iterable[Any] | None = None,
    seed: int = 0,
) -> SearchResult:
    """The best configuration found that costs no more than the budget; the network is set to it.

    Args:
        calib_loader: (image, label) held out from training; read once, the same images for every candidate.
        budget: {"bitops_G": number}, {"size_MiB": number} or {"latency_ms": number}, fixed layers included.
        objective: mean cross entropy, or top-1 error with the cross entropy deciding ties.
        compat: "reference": the greedy search of the original code, move by move, with its constants and defects.
        respect_frozen: use only the weight bits that the training's last scheduler event allows.
        latency: the table that a budget in milliseconds needs.
        evaluations: of the evolution and of the random search.
        storage: of the evolution, a file or a database URL; it is continued from there.
        alone: whether no other process works on the same storage.
        test_loader: (image, label) that the result will be judged on: none of them may be searched on.

    Raises:
        InputError: an unknown method, no image, an image of the test data, or a budget below the cheapest or above the
            dearest configuration (with what can be reached).
        WorkError: the method ends without a configuration.
    """
    images = Images(net, calib_loader, test_loader)
    options = {"compat": compat, "respect_frozen": respect_frozen, "latency": latency, "evaluations": evaluations}
    return _search(net, images, budget, method, objective, seed=seed, storage=storage, alone=alone, **options)


def search_front(
    net: Supernet,
    calib_loader: Iterable[Any],
    budgets: Sequence[Mapping[str, float]],
    method: Method = "greedy",
    objective: Literal["loss", "error"] = "loss",
    *,
    test_loader: Iterable[Any] | None = None,
    **options: Any,
) -> Front:
    """`search` for each budget, all in one unit; what was measured for one is not measured again for the next.

    Raises:
        InputError: also when the budgets are in several units, or there is none.
    """
    units = {unit for budget in budgets for unit in budget}
    if len(units) != 1:
        raise InputError("budgets", found=sorted(units) or "none", expected="some, in one unit")
    images = Images(net, calib_loader, test_loader)
    results = tuple(_search(net, images, budget, method, objective, **options) for budget in budgets)
    (unit,) = units
    problem = Problem(net, images, budgets[0], objective, latency=options.get("latency"))
    rows, best = [], float("inf")
    for bits in sorted(images.measured, key=lambda b: (problem.cost(b), problem.measure(b))):
        value = problem.measure(bits)[0]
        if value < best:
            best = value
            rows.append((problem.described(bits), problem.cost(bits), *images.measured[bits]))
    table = Table("front of all measured configurations", ("weight/activation bits", unit, "loss", "error (%)"), rows)
    return Front(results, table)


def _search(
    net: Supernet,
    images: Images,
    budget: Mapping[str, float],
    method: str,
    objective: str,
    *,
    seed: int = 0,
    compat: str | None = None,
    respect_frozen: bool = False,
    latency: Latency | None = None,
    evaluations: int = evolution.EVALUATIONS,
    storage: str | Path | None = None,
    alone: bool = True,
) -> SearchResult:
    if method not in METHODS:
        raise InputError("method", found=method, expected=" or ".join(METHODS))
    if compat not in (None, "reference"):
        raise InputError("compat", found=compat, expected="reference, or nothing")
    if compat and (method != "greedy" or set(budget) != {"bitops_G"}):
        raise InputError("compat", found=f"{method} under {set(budget)}", expected="greedy under bitops_G")
    if storage is not None and method != "evolution":
        raise InputError("storage", found=f"with method {method}", expected="method evolution")
    if evaluations < 1:
        raise InputError("evaluations", found=evaluations, expected="1 or more")
    problem = Problem(net, images, budget, objective, respect_frozen, latency)
    if compat:
        best = original(problem)
    elif method == "evolution":
        best = evolution.evolution(problem, seed, evaluations, storage, alone=alone)
    elif method == "random":
        best = evolution.random(problem, seed, evaluations)
    else:
        best = (greedy.greedy if method == "greedy" else ilp.ilp)(problem)
    result = problem.result(best, method)
    net.set_bits(result.config)
    return result
