"""What a search decides, and within which budget: timesteps (one a group) and bits (one gene a tensor)."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from papercore.errors import InputError
from papercore.search import Genome, Space

from tmpqdm.cost import CostModel
from tmpqdm.groups import TimestepGroups

if TYPE_CHECKING:
    from tmpqdm.solver import PrecisionSolver

BitsMap = dict[str, dict[str, int]]
Limit = int | float | str | None


@dataclasses.dataclass(frozen=True)
class Budget:
    """Limits of a plan; several hold together. A text "uniform:6" stands for what 6 bits everywhere cost."""

    bitops_per_step: Limit = None
    """BitOps of one image and one step; where steps have bits of their own, of their mean"""
    bitops: Limit = None
    """BitOps of one image over all steps"""
    size_bytes: Limit = None
    """stored bytes of the network"""
    steps: int | None = None
    """visited timesteps: the number of groups must not be larger"""

    def resolve(self, cost: CostModel, uniform: "Uniform", steps: int) -> "Limits":
        """The limits as numbers.

        Raises:
            InputError: a text that is none, a number that is not above 0, or more steps than allowed.
        """
        if self.steps is not None and steps > self.steps:
            raise InputError("budget steps", found=f"{steps} groups", expected=f"at most {self.steps}")

        def number(name: str, value: Limit, of: Mapping[int, int]) -> float:
            if value is None:
                return math.inf
            if isinstance(value, str):
                word, _, bits = value.partition(":")
                if word != "uniform" or not bits.isdigit() or int(bits) not in of:
                    menu = ", ".join(f"uniform:{b}" for b in of)
                    raise InputError(f"budget {name}", found=value, expected=f"a number, or {menu}")
                return float(of[int(bits)])
            if not 0 < value < math.inf:
                raise InputError(f"budget {name}", found=value, expected="above 0")
            return float(value)

        each = {bits: cost.bitops(uniform(bits)) for bits in uniform.menu}
        total = {bits: value * steps for bits, value in each.items()}
        sizes = {bits: cost.size_bytes(uniform(bits)) for bits in uniform.menu}
        return Limits(
            number("bitops_per_step", self.bitops_per_step, each),
            number("bitops", self.bitops, total),
            number("size_bytes", self.size_bytes, sizes),
        )


@dataclasses.dataclass(frozen=True)
class Uniform:
    """Equal bits for all genes of a solver, pinned ones excepted."""

    solver: "PrecisionSolver"

    @property
    def menu(self) -> tuple[int, ...]:
        return self.solver.bits

    def __call__(self, bits: int) -> BitsMap:
        return self.solver.uniform(bits)


@dataclasses.dataclass(frozen=True)
class Limits:
    """A budget in numbers; infinite where there is none."""

    bitops_per_step: float
    bitops: float
    size_bytes: float

    def per_step(self, steps: int) -> float:
        """The most BitOps of one step, where all have the same bits."""
        return min(self.bitops_per_step, self.bitops / steps)


class SearchSpace:
    """Genes and what they mean.

    Args:
        solver: whose operations and menu are searched.
        groups: one timestep of each is visited.
        cost: counts BitOps and bytes.
        budget: what plans must keep to.
        search_timesteps: False fixes the list to `timesteps`.
        search_bits: False fixes the bits to `bits`.
        per_step: every step has bits of its own (the published mode "groupwise").
        timesteps, bits: of what is not searched; None: the first of every group, the most bits that fit uniformly.

    Raises:
        InputError: a budget below the cheapest plan (both numbers are told), or fixed parts that do not fit.
    """

    def __init__(
        self,
        solver: "PrecisionSolver",
        groups: TimestepGroups,
        cost: CostModel,
        budget: Budget | None = None,
        *,
        search_timesteps: bool = True,
        search_bits: bool = True,
        per_step: bool = False,
        timesteps: Sequence[int] | None = None,
        bits: Mapping[str, Mapping[str, int]] | None = None,
    ) -> None:
        self.solver, self.groups, self.cost, self.budget = solver, groups, cost, budget or Budget()
        self.search_timesteps, self.search_bits, self.per_step = search_timesteps, search_bits, per_step
        uniform = Uniform(solver)
        self.limits = self.budget.resolve(cost, uniform, groups.n_groups)
        self.timesteps = tuple(groups.first() if timesteps is None else timesteps)
        if not search_timesteps and not groups.contains(self.timesteps):
            raise InputError("timesteps", found=list(self.timesteps), expected="one in every group")
        self.bit_genes = tuple((op.name, gene) for op in solver.ops for gene in op.genes if gene not in op.pinned)
        cheapest = uniform(solver.bits[-1])
        self.check_cheapest(cheapest)
        complete = solver.complete(self.largest_uniform(uniform) if bits is None else bits)
        self.fixed_bits: BitsMap = {op.name: {gene: complete[op.name][gene] for gene in op.genes} for op in solver.ops}
        if not search_bits and not self.fits_bits([self.fixed_bits] * (groups.n_groups if per_step else 1)):
            raise InputError("bits", found="more than the budget allows", expected="bits within it")
        self.genes = self._genes()
        self._place = {name: i for i, name in enumerate(self.genes)}
        if not self.genes:
            raise InputError("search", found="nothing to search", expected="timesteps, bits or both")

    def _genes(self) -> dict[str, tuple[int, ...]]:
        genes: dict[str, tuple[int, ...]] = {}
        if self.search_timesteps:
            genes |= {f"t{g}": tuple(group) for g, group in enumerate(self.groups.groups)}
        if self.search_bits:
            copies = range(self.groups.n_groups) if self.per_step else (None,)
            for copy in copies:
                for name, gene in self.bit_genes:
                    genes[gene_name(name, gene, copy)] = tuple(self.solver.bits)
        return genes

    def check_cheapest(self, cheapest: BitsMap) -> None:
        """Raises InputError when the fewest bits exceed the budget."""
        steps, limits = self.groups.n_groups, self.limits
        each, size = self.cost.bitops(cheapest), self.cost.size_bytes(cheapest)
        for name, least, limit in (
            ("bitops_per_step", each, limits.bitops_per_step),
            ("bitops", each * steps, limits.bitops),
            ("size_bytes", size, limits.size_bytes),
        ):
            if least > limit:
                raise InputError(f"budget {name}", found=f"{limit:.6g}", expected=f"at least {least:.6g}, the cheapest")

    def largest_uniform(self, uniform: Uniform) -> BitsMap:
        """The most bits of the menu that fit everywhere alike."""
        for bits in uniform.menu:
            found = uniform(bits)
            if self.fits_bits([found]):
                return found
        raise InputError("budget", found="no uniform bits fit", expected="a larger one")

    def fits_bits(self, steps: Sequence[Mapping[str, Mapping[str, int]]], share: float = 1.0) -> bool:
        """Whether bits (one set for all steps, or one a step) are within a share of the budget."""
        limits, count = self.limits, self.groups.n_groups
        each = self.cost.bitops_many(np.array([self.cost.column(bits) for bits in steps]))
        mean = float(each.mean())
        if mean > share * limits.bitops_per_step or mean * count > share * limits.bitops:
            return False
        return math.isinf(limits.size_bytes) or self.cost.size_bytes(list(steps)) <= share * limits.size_bytes

    # ---- genomes

    def decode(self, genome: Genome) -> tuple[tuple[int, ...], list[BitsMap]]:
        """(timesteps, bits: one set for all steps, or one a step)."""
        values = {name: choices[i] for (name, choices), i in zip(self.genes.items(), genome, strict=True)}
        count = self.groups.n_groups
        timesteps = tuple(values[f"t{g}"] for g in range(count)) if self.search_timesteps else self.timesteps
        if not self.search_bits:
            return timesteps, [self.fixed_bits]
        steps = []
        for copy in range(count) if self.per_step else (None,):
            bits = {name: dict(genes) for name, genes in self.fixed_bits.items()}
            for name, gene in self.bit_genes:
                bits[name][gene] = values[gene_name(name, gene, copy)]
            steps.append(bits)
        return timesteps, steps

    def encode(self, timesteps: Sequence[int], steps: Sequence[Mapping[str, Mapping[str, int]]]) -> Genome:
        """The genome of timesteps and bits.

        Raises:
            InputError: a value that is no choice.
        """
        genome = []
        for name, choices in self.genes.items():
            if name in self._times:
                value = timesteps[self._times[name]]
            else:
                op, gene, copy = self._meaning[name]
                value = steps[copy if copy is not None and len(steps) > 1 else 0][op][gene]
            if value not in choices:
                raise InputError(f"gene {name}", found=value, expected=f"one of {choices[0]}..{choices[-1]}")
            genome.append(choices.index(value))
        return tuple(genome)

    @property
    def _times(self) -> dict[str, int]:
        return {f"t{g}": g for g in range(self.groups.n_groups)} if self.search_timesteps else {}

    @property
    def _meaning(self) -> dict[str, tuple[str, str, int | None]]:
        copies = range(self.groups.n_groups) if self.per_step else (None,)
        return {gene_name(name, gene, copy): (name, gene, copy) for copy in copies for name, gene in self.bit_genes}

    def fits(self, genome: Genome) -> bool:
        return not self.search_bits or self.fits_bits(self.decode(genome)[1])

    def within(self, genome: Genome, share: float) -> bool:
        return not self.search_bits or self.fits_bits(self.decode(genome)[1], share)

    def space(self, start: Sequence[Genome] = ()) -> Space:
        """For papercore's search."""
        return Space(self.genes, self.fits, start, costless=tuple(self._times), within=self.within)

    def log10_size(self) -> float:
        """log10 of how many plans there are, the budget aside."""
        return sum(math.log10(len(choices)) for choices in self.genes.values())


def gene_name(operation: str, gene: str, step: int | None) -> str:
    return f"{operation}.{gene}" if step is None else f"{operation}.{gene}@{step}"
