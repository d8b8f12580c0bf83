"""How much each gene alone damages the predicted noise, and the bits that such damages recommend under a budget.

One sweep: everything in full precision but one tensor at one bit-width; the damage is the mean squared change of the
network's output on calibration inputs. Damages are taken to add up; which bits are then best within a budget is a
multiple-choice knapsack, solved by bisection on a Lagrange multiplier. (The principle of MixDQ, arXiv 2405.17873.)
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from papercore.errors import InputError
from papercore.progress import Progress
from papercore.rundir import read_json, write_json

from tmpqdm.models import predict

if TYPE_CHECKING:
    from tmpqdm.calibration import CalibrationSet
    from tmpqdm.cost import CostModel
    from tmpqdm.solver import PrecisionSolver

Floats = NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """Damages: operation -> gene -> bits -> mean squared change of the output."""

    damage: Mapping[str, Mapping[str, Mapping[int, float]]]
    power: float
    """mean square of the output in full precision"""
    samples: int

    def save(self, path: Path) -> None:
        write_json(path, dataclasses.asdict(self))

    @classmethod
    def load(cls, path: Path) -> "Sensitivity":
        """Raises InputError for a file that is something else."""
        values = read_json(path)
        try:
            damage = {
                name: {gene: {int(b): float(d) for b, d in row.items()} for gene, row in genes.items()}
                for name, genes in values["damage"].items()
            }
            return cls(damage, float(values["power"]), int(values["samples"]))
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise InputError("sensitivities", where=path, found=repr(error), expected="a file of a sweep") from error


@torch.no_grad()
def sweep(
    solver: "PrecisionSolver", data: "CalibrationSet", *, samples: int = 256, batch_size: int = 64, label: str = "sweep"
) -> Sensitivity:
    """Measures every gene that is not pinned at every width of the menu.

    Args:
        solver: calibrated.
        data: inputs along trajectories; `samples` of them, evenly spread over the set, are used.
    """
    rows = torch.linspace(0, len(data) - 1, min(samples, len(data))).round().long()
    chosen = data[rows]
    parameter = next(solver.network.parameters())
    x, t = chosen.x.to(parameter.device, parameter.dtype), chosen.t.to(parameter.device)
    cond = {name: value.to(parameter.device) for name, value in chosen.cond.items()}
    parts = [slice(i, i + batch_size) for i in range(0, len(x), batch_size)]

    def outputs() -> list[torch.Tensor]:
        return [predict(solver.network, x[p], t[p], {k: v[p] for k, v in cond.items()}) for p in parts]

    genes = [(op.name, gene) for op in solver.ops for gene in op.genes if gene not in op.pinned]
    damage: dict[str, dict[str, dict[int, float]]] = {}
    with solver.full_precision(), Progress(label, len(genes)) as progress:
        exact = outputs()
        count = sum(part.numel() for part in exact)
        power = sum(float(part.double().square().sum()) for part in exact) / count
        for name, gene in genes:
            part = solver.layers.get(name) or solver.attentions[name]
            row = damage.setdefault(name, {}).setdefault(gene, {})
            try:
                for bits in solver.bits:
                    part.set(gene, bits)
                    changes = (float((a - b).double().square().sum()) for a, b in zip(outputs(), exact, strict=True))
                    row[bits] = sum(changes) / count
            finally:
                part.set(gene, None)
            progress.advance(name)
    return Sensitivity(damage, power, len(x))


def recommended_bits(
    solver: "PrecisionSolver",
    cost: "CostModel",
    sensitivity: Sensitivity,
    *,
    bitops: float | None = None,
    size: float | None = None,
) -> dict[str, dict[str, int]]:
    """The bits of least total damage within a budget; complete, pinned genes included.

    Args:
        bitops: most BitOps of one image and step.
        size: most bytes of the stored network.

    Raises:
        InputError: no bits of the menu fit.
    """
    layers = {layer.name: layer for layer in cost.layers}
    products = {entry.name: entry for entry in cost.attentions}
    softmax = cost.softmax_bits or 32
    settings: list[list[dict[str, int]]] = []
    tables: list[tuple[Floats, Floats]] = []
    for op in solver.ops:
        menus = [(op.pinned[gene],) if gene in op.pinned else solver.bits for gene in op.genes]
        made = [dict(zip(op.genes, values, strict=True)) for values in itertools.product(*menus)]
        damages, costs = [], []
        for bits in made:
            known = sensitivity.damage.get(op.name, {})
            try:
                damages.append(sum(known[gene][width] for gene, width in bits.items() if gene not in op.pinned))
            except KeyError as error:
                raise InputError(
                    f"sensitivity of {op.name}", found=f"nothing for {error}", expected="a value"
                ) from None
            if op.kind == "layer":
                layer = layers[op.name]
                scales = -(-layer.channels * layer.halves * (16 + bits["w"]) // 8)
                costs.append((layer.macs * bits["w"] * bits["a"], -(-layer.weights * bits["w"] // 8) + scales))
            else:
                entry = products.get(op.name)
                qk, sv = (entry.qk, entry.sv) if entry else (0, 0)
                costs.append((qk * bits["q"] * bits["k"] + sv * bits.get("p", softmax) * bits["v"], 0))
        settings.append(made)
        tables.append((np.array(damages, np.float64), np.array(costs, np.float64)))
    rest = -(-(cost.other_parameters + sum(layer.bias for layer in cost.layers)) * 16 // 8)
    limits = (np.inf if bitops is None else bitops, np.inf if size is None else size - rest)
    chosen = knapsack(tables, limits)
    return {op.name: settings[i][choice] for i, (op, choice) in enumerate(zip(solver.ops, chosen, strict=True))}


def knapsack(tables: Sequence[tuple[Floats, Floats]], limits: Sequence[float]) -> list[int]:
    """One choice of every table: least total damage with total costs within the limits.

    Bisection on one multiplier a limit finds the best choice on the convex hull; what is left of the budget is then
    spent on the single changes that gain most for their cost.

    Args:
        tables: (damage [choices], cost [choices, limits]) each.
        limits: of the summed costs; may be infinite.

    Raises:
        InputError: the cheapest choices exceed a limit.
    """
    bounds = np.asarray(limits, np.float64)
    least = np.sum([cost.min(0) for _, cost in tables], 0)
    if (least > bounds).any():
        at = int(np.argmax(least > bounds))
        raise InputError("budget", found=bounds[at], expected=f"at least {least[at]:.6g}, what the fewest bits cost")
    scale = np.maximum(np.sum([cost.max(0) for _, cost in tables], 0), 1e-300)
    spread = max(float(np.sum([damage.max() for damage, _ in tables])), 1e-300)

    def pick(multipliers: Floats) -> list[int]:
        weights = multipliers * spread / scale
        return [int(np.lexsort((cost.sum(1), damage + cost @ weights))[0]) for damage, cost in tables]

    def total(choice: Sequence[int]) -> Floats:
        return np.sum([cost[i] for (_, cost), i in zip(tables, choice, strict=True)], 0)

    def solve(multipliers: Floats, axis: int) -> list[int]:
        """The multipliers of the limits from `axis` on are found, the last innermost."""
        if axis == len(bounds):
            return pick(multipliers)
        trial = multipliers.copy()
        trial[axis] = 0.0
        choice = solve(trial, axis + 1)
        if total(choice)[axis] <= bounds[axis]:
            return choice
        low, high = -30.0, 30.0  # of the multiplier's logarithm
        trial[axis] = np.exp(high)
        choice = solve(trial, axis + 1)
        for _ in range(50 if axis == len(bounds) - 1 else 25):
            middle = (low + high) / 2
            trial[axis] = np.exp(middle)
            found = solve(trial, axis + 1)
            if total(found)[axis] <= bounds[axis]:
                choice, high = found, middle
            else:
                low = middle
        return choice

    finite = [axis for axis in range(len(bounds)) if np.isfinite(bounds[axis])]
    if not finite:
        return pick(np.zeros(len(bounds)))
    order = [*[axis for axis in range(len(bounds)) if axis not in finite], *finite]
    tables = [(damage, cost[:, order]) for damage, cost in tables]
    bounds, scale = bounds[order], scale[order]
    choice = solve(np.zeros(len(bounds)), 0)
    if (total(choice) > bounds).any():  # two limits that pull apart: start from the cheapest in all
        choice = [int(np.argmin((cost / np.maximum(scale, 1e-300)).sum(1))) for _, cost in tables]
        if (total(choice) > bounds).any():
            raise InputError("budget", found="limits that no choice meets together", expected="larger ones")
    return _spend(tables, choice, bounds, scale, total)


def _spend(
    tables: Sequence[tuple[Floats, Floats]],
    choice: Sequence[int],
    bounds: Floats,
    scale: Floats,
    total: Callable[[Sequence[int]], Floats],
) -> list[int]:
    chosen = list(choice)
    while True:
        left = bounds - total(chosen)
        best: tuple[float, int, int] | None = None
        for i, (damage, cost) in enumerate(tables):
            gain, extra = damage[chosen[i]] - damage, cost - cost[chosen[i]]
            fits = (extra <= left).all(1) & (gain > 0)
            if fits.any():
                price = np.maximum((extra / scale).max(1), 1e-18)
                value = np.where(fits, gain / price, -np.inf)
                place = int(value.argmax())
                if best is None or value[place] > best[0]:
                    best = (float(value[place]), i, place)
        if best is None:
            return chosen
        chosen[best[1]] = best[2]


def summary(sensitivity: Sensitivity) -> list[dict[str, Any]]:
    """A row a gene: damages relative to the output's power, most sensitive first."""
    rows = [
        {"operation": name, "gene": gene, **{f"{bits} bits": value / sensitivity.power for bits, value in row.items()}}
        for name, genes in sensitivity.damage.items()
        for gene, row in genes.items()
    ]
    return sorted(rows, key=lambda row: -float(list(row.values())[-1]))
