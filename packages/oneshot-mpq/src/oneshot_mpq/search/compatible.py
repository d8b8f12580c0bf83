"""The original's greedy search on a network: top-1 error, every step on the next batch, statistics of the batch."""

from papercore.errors import InputError

from oneshot_mpq.search.problem import Bits, Problem
from oneshot_mpq.search.reference_greedy import level, reference_greedy


def original(problem: Problem) -> Bits:
    """Raises InputError where the original has no constants for the model and budget."""
    weights, activations = problem.choices[::2], problem.choices[1::2]
    end = level(problem.net.name, problem.budget)
    if end is None:
        raise InputError(
            "compat",
            found=f"{problem.net.name} under {problem.budget:g} G",
            expected="a model and budget that the original has constants for (resnet18, mobilenetv2, efficientnet)",
        )
    macs = [int(n) for n in problem.costs.macs[: len(weights)]]

    def error(w: object, a: object, step: int) -> float:
        return problem.error_on(step, problem.bits(w, a))  # pyright: ignore[reportArgumentType]

    found = reference_greedy(weights, activations, macs, problem.offset, problem.budget, error, weight_level=end)
    return problem.bits(found.weight_bits, found.act_bits)
