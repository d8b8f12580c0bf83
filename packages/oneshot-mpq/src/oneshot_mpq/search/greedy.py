"""Bidirectional greedy search from the most bits down."""

from oneshot_mpq.search.problem import Bits, Problem

SWAP_EVERY = 4
"""moves down between two tries to give a bit back"""


def neighbours(problem: Problem, bits: Bits, direction: int) -> list[Bits]:
    """All configurations in which one tensor has its next candidate, up (1) or down (-1)."""
    found = []
    for i, choices in enumerate(problem.choices):
        position = choices.index(bits[i]) + direction
        if 0 <= position < len(choices):
            found.append((*bits[:i], choices[position], *bits[i + 1 :]))
    return found


def greedy(problem: Problem, seed: int = 0) -> Bits:
    """Down moves of the smallest loss for what they save, until the budget is kept; in between and at the end, swaps:
    one tensor up and another down at no more cost, taken only when they lower the loss."""
    bits, moves = problem.highest, 0
    while not problem.fits(bits):
        here, cost = problem.measure(bits), problem.cost(bits)

        def price(candidate: Bits, here: tuple[float, float] = here, cost: float = cost) -> tuple[float, float]:
            saved = cost - problem.cost(candidate)
            gain = problem.measure(candidate)[0] - here[0]
            # a move that saves nothing in the budget's unit is never worth it
            return (gain / saved if saved > 0 else float("inf"), -saved)

        down = neighbours(problem, bits, -1)
        if not down:  # a latency table need not fall with the bits
            return problem.cheapest
        bits = min(down, key=price)
        moves += 1
        if moves % SWAP_EVERY == 0:
            bits = swap(problem, bits) or bits
    for _ in range(2 * len(bits)):  # an end for the case that swaps keep helping
        better = swap(problem, bits)
        if better is None:
            return bits
        bits = better
    return bits


def swap(problem: Problem, bits: Bits) -> Bits | None:
    """A bit for the tensor that wants it most, paid by the one that needs it least; nothing: it does not help."""
    here, cost = problem.measure(bits), max(problem.cost(bits), problem.budget)
    up = min(neighbours(problem, bits, 1), key=problem.measure, default=None)
    if up is None:
        return None
    if problem.cost(up) <= cost * (1 + 1e-12):
        return up if problem.measure(up) < here else None
    paid = [c for c in neighbours(problem, up, -1) if c != bits and problem.cost(c) <= cost * (1 + 1e-12)]
    best = min(paid, key=problem.measure, default=None)
    return best if best is not None and problem.measure(best) < here else None
