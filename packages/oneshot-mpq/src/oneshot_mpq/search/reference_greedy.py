"""The original code's greedy search, move by move (`util.greedy_search` of its repository; specification, 2.5).

First weights, then activations; every move changes one tensor by one bit, up or down, to the smallest of
1.5 error / largest error - saved cost / largest cost. Kept for comparison: it can fail to end, and its constants are
those of three networks.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from papercore.errors import WorkError
from papercore.quant.macs import bitops

LOWEST_FROM = 5.0
"""budgets from here on do not go below 3 bits"""
MARGIN, WEIGHT_OF_ERROR = 0.95, 1.5
LEVELS: dict[str, tuple[tuple[float, float, int], ...]] = {
    "resnet18": ((31, 36, 4), (20.0001, 23.9, 3), (0, 20, 2)),
    "mobilenetv2": ((5.0, 5.8, 4), (3.3, 3.8, 3), (0, 1e9, 4)),
    "efficientnet": ((6.3, 7.1, 4), (0, 1e9, 3)),
}
"""(from, to, weight bits whose cost ends the weight phase), G bit operations at 224 x 224, the first that holds"""


class Move(NamedTuple):
    """One step of a search."""

    phase: str
    layer: int
    new_bits: int
    score: float
    error: float
    bitops_G: float


class Outcome(NamedTuple):
    """Where a search ended, and how it came there."""

    weight_bits: tuple[int, ...]
    act_bits: tuple[int, ...]
    trace: tuple[Move, ...]


def level(model: str, budget: float) -> int | None:
    """The weight bits that the original chooses for a budget; nothing: it has none for this model or budget."""
    known = next((k for k in LEVELS if model.lower().replace("_", "").startswith(k)), None)
    return next((bits for low, high, bits in LEVELS.get(known or "", ()) if low <= budget <= high), None)


def reference_greedy(
    weight_choices: Sequence[Sequence[int]],
    act_choices: Sequence[Sequence[int]],
    macs: Sequence[int],
    fixed_G: float,
    budget: float,
    error: Callable[[Sequence[int], Sequence[int], int], float],
    *,
    start_bits: int = 5,
    weight_level: int = 4,
) -> Outcome:
    """See the module.

    Args:
        weight_choices, act_choices: candidates by layer.
        macs: multiply-accumulates by layer; costs are these times both bits, plus `fixed_G` (1e9).
        error: (weight bits, activation bits, step) -> error, smaller is better.
        start_bits: of every tensor (where a layer has no such candidate, its nearest above or its highest).
        weight_level: the weight phase ends at 0.95 of the cost of these weight bits with activations at the start.

    Raises:
        WorkError: no move is left, or the moves go on without an end.
    """
    counts = np.array(macs, np.int64)

    def cost(w: Sequence[int], a: Sequence[int]) -> float:
        return int(bitops(counts, np.array(w), np.array(a))) / 1e9 + fixed_G

    def nearest(choices: Sequence[int]) -> int:
        return min((b for b in choices if b >= start_bits), default=max(choices))

    bits = {"weight": [nearest(c) for c in weight_choices], "act": [nearest(c) for c in act_choices]}
    choices = {"weight": weight_choices, "act": act_choices}
    lowest = 3 if budget >= LOWEST_FROM else 2
    end_of_weights = MARGIN * cost([weight_level] * len(counts), bits["act"])
    trace: list[Move] = []
    limit = 8 * sum(len(c) for c in (*weight_choices, *act_choices))
    phase = "weight"
    while True:
        here = cost(bits["weight"], bits["act"])
        if here <= end_of_weights:
            phase = "act"
        if here < budget:
            return Outcome(tuple(bits["weight"]), tuple(bits["act"]), tuple(trace))
        if len(trace) >= limit:
            raise WorkError(f"the original's greedy search has not ended after {limit} moves at {here:.6g} G")
        tried: list[tuple[int, int, float, float]] = []
        for i, allowed in enumerate(choices[phase]):
            for new in (bits[phase][i] - 1, bits[phase][i] + 1):
                if not lowest <= new <= max(allowed) or new not in allowed:
                    continue
                old, bits[phase][i] = bits[phase][i], new
                found = error(bits["weight"], bits["act"], len(trace))
                tried.append((i, new, found, cost(bits["weight"], bits["act"])))
                bits[phase][i] = old
        if not tried:
            raise WorkError(f"the original's greedy search has no move left in its {phase} phase at {here:.6g} G")
        worst, dearest = max(t[2] for t in tried) or 1.0, max(t[3] for t in tried)
        scores = [WEIGHT_OF_ERROR * e / worst - (dearest - c) / dearest for _, _, e, c in tried]
        best = int(np.argmin(scores))  # the first of equals
        i, new, found, after = tried[best]
        bits[phase][i] = new
        trace.append(Move(phase, i, new, scores[best], found, after))
