"""The search for one group size per layer under a cost limit (Q-DiT, arXiv 2406.17343, section 3.3 and algorithm 1).

The paper limits BitOps, the code a mean of group sizes that is no cost. Here the limit is what sizes really cost:
storage (bits per weight with scales and zero points) and rescaling work (one float multiply-add for every row, group
and token), both hard. Every layer is quantised once for every size of the menu; a candidate switches between them.
"""

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Int
from papercore.diffusion import frechet_distance, statistics
from papercore.errors import InputError, located
from papercore.images import images_to_uint8
from papercore.quant import layer_cost
from papercore.report import Picture, Table
from papercore.search import EvolutionSampler, Genome, Space, open_study, run_search
from torch import Tensor, nn

from qdit.blockwise import round_layer
from qdit.calibration import Calibration
from qdit.config import QDiTConfig
from qdit.convert import collect_hessians, noise_error, quantize
from qdit.evaluate import Features, FeatureSpace, describe, feature_space
from qdit.layers import QuantLinear
from qdit.sampling import sample_many
from qdit.targets import Target, find_targets, full_weight

Fitness = Callable[[nn.Module], float]
"""quantised candidate -> what to make small"""

LIMITS = ("bits_per_weight", "rescales_per_token")


@dataclasses.dataclass(frozen=True)
class SearchResult:
    """What a search found."""

    best: dict[str, int]
    """group size of every layer"""
    table: Table
    """the best candidates and the uniform sizes: fitness, held-out fitness, costs"""
    pareto: Table
    """candidates that no other beats in both fitness and bits per weight"""
    evaluations: list[tuple[dict[str, int], float]]
    """everything that was evaluated, in order"""

    @property
    def config_sizes(self) -> dict[str, int | None]:
        """`best` as the `group_size` of a configuration."""
        return dict(self.best)


def search_group_sizes(
    model: nn.Module,
    config: QDiTConfig,
    fitness: Fitness,
    *,
    menu: Sequence[int] = (32, 64, 128, 192, 288),
    limit: int | Mapping[str, float],
    population: int = 50,
    top_k: int = 10,
    iterations: int = 10,
    mutation: float = 0.1,
    seed: int = 0,
    storage: str | Path | None = None,
    calibration: Calibration | None = None,
    held_out: Fitness | None = None,
    rerank: Fitness | None = None,
    reranked: int = 10,
    notes: Mapping[str, Any] | None = None,
    alone: bool = True,
) -> SearchResult:
    """Searches group sizes for the layers of `model`.

    Args:
        config: everything but the group sizes. With GPTQ, candidates are rounded for inputs collected once, with
            activations quantised at the middle size of the menu; the winner should be quantised anew.
        fitness: of a quantised candidate, smaller is better; must be the same function of the candidate every time.
        menu: sizes; those above a layer's columns stand for whole rows there.
        limit: a uniform size that may not be exceeded in storage and rescaling, or a mapping with
            `bits_per_weight`, `rescales_per_token`, or both.
        population, top_k, iterations, mutation: of the evolutionary search; population x iterations evaluations.
        storage: None, a file that is only appended to, or a database URL; a search goes on from it.
        held_out: fitness on other inputs, measured for the best ten and the uniform sizes.
        rerank: another fitness by which the `reranked` best are ordered again at the end; proxies mislead.
        notes: what else the fitness depends on, as JSON values; a storage whose search had other notes is refused.
        alone: False while other workers search on the same storage.

    Raises:
        InputError: an empty menu, an unknown limit, or one below what the largest sizes cost (names that cost).
    """
    if not menu or any(not isinstance(size, int) or size < 1 for size in menu):
        raise InputError("menu", found=list(menu), expected="group sizes of at least 1")
    sizes = sorted(set(menu))
    targets = find_targets(model, dataclasses.replace(config, group_size=None, adaln_bits=None))
    limits = limits_of(targets, config, limit)
    genes = {target.name: [min(size, target.columns) for size in sizes] for target in targets}

    def fits(genome: Genome) -> bool:
        cost = costs(targets, config, [genes[t.name][i] for t, i in zip(targets, genome, strict=True)])
        return all(cost[name] <= most * (1 + 1e-12) for name, most in limits.items())

    cheapest = costs(targets, config, [genes[t.name][-1] for t in targets])
    for name, most in limits.items():
        if cheapest[name] > most * (1 + 1e-12):
            raise InputError(
                f"limit {name}", found=most, expected=f"at least {cheapest[name]:.6g}, what size {sizes[-1]} costs"
            )
    uniform = [tuple(i for _ in targets) for i in range(len(sizes))]
    start = [genome for genome in uniform if fits(genome)][:1]  # the smallest uniform size that fits
    space = Space(genes, fits, start)
    candidates = Candidates(model, config, targets, sizes, calibration)
    sampler = EvolutionSampler(space, population=population, top_k=top_k, mutation=mutation, seed=seed)
    study = open_study(storage, "group-sizes", sampler, alone=alone)
    description = {
        "layers": [target.name for target in targets],
        "menu": sizes,
        "limits": limits,
        "population": population,
        "top_k": top_k,
        "mutation": mutation,
        "seed": seed,
        "wbits": config.wbits,
        "abits": config.abits,
        "gptq": config.gptq,
        "act_order": config.act_order,
        "percdamp": config.percdamp,
        "notes": dict(notes or {}),
    }
    with located(storage or "search"):
        found = run_search(
            study,
            sampler,
            lambda genome: fitness(candidates.switch(genome)),
            population * iterations,
            description=description,
            alone=alone,
            label="group sizes",
        )

    def named(genome: Genome) -> dict[str, int]:
        return {target.name: genes[target.name][i] for target, i in zip(targets, genome, strict=True)}

    unique = {evaluation.genome: evaluation.fitness for evaluation in found}
    ranked = sorted(unique, key=lambda genome: unique[genome])

    second: dict[Genome, float] = {}
    if rerank is not None:
        second = {genome: rerank(candidates.switch(genome)) for genome in ranked[:reranked]}
        ranked = [*sorted(second, key=lambda genome: second[genome]), *ranked[reranked:]]

    def row(label: str, genome: Genome) -> tuple[Any, ...]:
        value = unique[genome] if genome in unique else fitness(candidates.switch(genome))
        other = held_out(candidates.switch(genome)) if held_out is not None else None
        cost = costs(targets, config, list(named(genome).values()))
        if rerank is not None and genome not in second:
            second[genome] = rerank(candidates.switch(genome))
        return label, value, other, second.get(genome), cost["bits_per_weight"], int(cost["rescales_per_token"])

    columns = ("candidate", "fitness", "held-out fitness", "second fitness", "bits/weight", "rescales/token")
    rows = [row(f"searched {place + 1}", genome) for place, genome in enumerate(ranked[: min(10, top_k)])]
    rows += [row(f"uniform {size}", genome) for size, genome in zip(sizes, uniform, strict=True)]
    front = pareto([(unique[g], costs(targets, config, list(named(g).values()))["bits_per_weight"]) for g in ranked])
    best = named(ranked[0])
    return SearchResult(
        best,
        Table("searched and uniform group sizes", columns, rows),
        Table("Pareto front of the search", ("fitness", "bits/weight"), front),
        [(named(evaluation.genome), evaluation.fitness) for evaluation in found],
    )


def costs(targets: Sequence[Target], config: QDiTConfig, sizes: Sequence[int]) -> dict[str, float]:
    """Bits per weight with 16-bit scales and zero points, and rescaling multiply-adds per token, of all layers."""
    zero_bits = 0 if config.w_sym else config.wbits
    layers = [
        layer_cost(t.rows, t.columns, config.wbits, g, scale_bits=16, zero_bits=zero_bits)
        for t, g in zip(targets, sizes, strict=True)
    ]
    weights = [target.rows * target.columns for target in targets]
    bits = sum(layer.bits_per_weight * n for layer, n in zip(layers, weights, strict=True)) / sum(weights)
    return {"bits_per_weight": bits, "rescales_per_token": float(sum(layer.groups for layer in layers))}


def limits_of(targets: Sequence[Target], config: QDiTConfig, limit: int | Mapping[str, float]) -> dict[str, float]:
    """The limits by name."""
    if isinstance(limit, int) and not isinstance(limit, bool):
        if limit < 1:
            raise InputError("limit", found=limit, expected="a uniform group size of at least 1, or costs by name")
        return costs(targets, config, [min(limit, target.columns) for target in targets])
    if not isinstance(limit, Mapping) or not limit:
        raise InputError("limit", found=limit, expected="a uniform group size, or costs by name")
    for name, value in limit.items():
        if name not in LIMITS:
            raise InputError("limit", found=name, expected=" or ".join(LIMITS))
        if not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
            raise InputError(f"limit {name}", found=value, expected="a number above 0")
    return {name: float(value) for name, value in limit.items()}


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other point beats in one coordinate without losing in the other, by the second coordinate."""
    front: list[tuple[float, float]] = []
    for fitness, cost in sorted(set(points), key=lambda point: (point[1], point[0])):
        if not front or fitness < front[-1][0]:
            front.append((fitness, cost))
    return front


class Candidates:
    """A quantised model with every layer ready in every size."""

    def __init__(
        self,
        model: nn.Module,
        config: QDiTConfig,
        targets: Sequence[Target],
        sizes: Sequence[int],
        calibration: Calibration | None,
    ) -> None:
        middle = sizes[len(sizes) // 2]
        base = dataclasses.replace(config, group_size={t.name: min(middle, t.columns) for t in targets})
        base = dataclasses.replace(base, adaln_bits=None)
        self.targets = targets
        self.model = quantize(model, dataclasses.replace(base, gptq=False), calibration)
        hessians = None
        if config.gptq and config.wbits < 16:
            if calibration is None:
                raise InputError("calibration", found="none", expected="calibration inputs for GPTQ")
            hessians = collect_hessians(model, base, calibration)
        self.layers: dict[str, list[QuantLinear]] = {}
        for target in targets:
            weight, bias = full_weight(model, target)
            self.layers[target.name] = []
            for size in sizes:
                spec = dataclasses.replace(target.spec, group_size=min(size, target.columns))
                layer = QuantLinear(target.rows, target.columns, bias=target.bias, spec=spec, name=target.name)
                layer.to(weight.device)
                if bias is not None:
                    layer.bias = nn.Parameter(bias, requires_grad=False)
                if spec.act == "static":
                    raise InputError(
                        "field act", found="static", expected="dynamic: static ranges depend on the group size"
                    )
                round_layer(layer, weight, None if hessians is None else hessians[target.name], config)
                self.layers[target.name].append(layer)

    def switch(self, genome: Genome) -> nn.Module:
        """The model with the sizes of `genome`; the same object every time."""
        for target, choice in zip(self.targets, genome, strict=True):
            parent, _, last = target.name.rpartition(".")
            setattr(self.model.get_submodule(parent), last, self.layers[target.name][choice])
        return self.model


def noise_fitness(model: nn.Module, calibration: Calibration) -> Fitness:
    """P of a candidate on fixed inputs ("eps"): cheap, and layer-wise proxies are known to mislead; rank the best again
    with `frechet_fitness`."""
    reference = copy.deepcopy(model)
    return lambda candidate: noise_error(reference, candidate, calibration)


def frechet_fitness(
    reference: Tensor, space: str, labels: Int[Tensor, " n"], *, steps: int, guidance: float | None, seed: int
) -> Fitness:
    """Frechet distance of a candidate's samples to `reference` (uint8 images) in a named feature space, with the same
    noise and labels every time."""
    extract = feature_space(space)
    real = describe(reference, extract)
    return frechet_fitness_in(extract, real, labels, steps=steps, guidance=guidance, seed=seed)


def frechet_fitness_in(
    space: FeatureSpace,
    reference: Features,
    labels: Int[Tensor, " n"],
    *,
    steps: int,
    guidance: float | None,
    seed: int,
) -> Fitness:
    """The same with given features of the reference."""
    real = statistics(reference.features)

    def distance(candidate: nn.Module) -> float:
        images = images_to_uint8(sample_many(candidate, labels, steps, guidance=guidance, seed=seed))
        return frechet_distance(*statistics(describe(images, space).features), *real)

    return distance


def sizes_picture(best: Mapping[str, int]) -> Picture:
    """The chosen size of every layer: blocks from left to right, layers of a block from top to bottom."""
    from matplotlib.figure import Figure

    blocks: dict[str, dict[str, int]] = {}
    for name, size in best.items():
        parts = name.split(".")
        block, layer = (".".join(parts[:2]), ".".join(parts[2:])) if len(parts) > 2 else ("", name)
        blocks.setdefault(block, {})[layer] = size
    layers = list(dict.fromkeys(layer for sizes in blocks.values() for layer in sizes))
    grid = [[math.log2(sizes[layer]) if layer in sizes else math.nan for sizes in blocks.values()] for layer in layers]
    figure = Figure(figsize=(max(4.0, 0.4 * len(blocks) + 2), 0.5 * len(layers) + 1))
    axes = figure.add_subplot()
    low, high = math.log2(min(best.values())), math.log2(max(best.values()))
    axes.imshow(grid, aspect="auto", cmap="viridis_r", vmin=low, vmax=high)
    for x, sizes in enumerate(blocks.values()):
        for y, layer in enumerate(layers):
            if layer in sizes:
                ink = "white" if math.log2(sizes[layer]) > (low + high) / 2 else "black"
                axes.text(x, y, str(sizes[layer]), ha="center", va="center", color=ink, fontsize=8)
    axes.set_yticks(range(len(layers)), layers, fontsize=8)
    axes.set_xticks(range(len(blocks)), [str(i) for i in range(len(blocks))], fontsize=8)
    axes.set_xlabel("block")
    return Picture.of_figure("Group size of every layer", figure, "Dark is large: few scales, little rescaling.")
