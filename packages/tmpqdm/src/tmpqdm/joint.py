"""The joint search of timesteps and bits (TMPQ-DM, arXiv 2404.09532), on papercore's evolutionary search.

Every candidate switches the solver and is scored on the same noise. The start is the bits that single-gene
sensitivities recommend, on the first timesteps of the groups and on drawn ones; "paper" starts as published, from
uniform bits and mutations of them. The best candidates are scored again on fresh noise, and only that score decides.
"""

import dataclasses
import importlib.metadata
import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from papercore.errors import InputError, WorkError
from papercore.search import Evaluation, EvolutionSampler, Genome, open_study, run_search

from tmpqdm.cost import CostModel
from tmpqdm.fidelity import Rung, rank_correlation, successive_halving
from tmpqdm.groups import TimestepGroups
from tmpqdm.plan import Plan, betas_hash, largest_bits
from tmpqdm.space import BitsMap, Budget, SearchSpace

if TYPE_CHECKING:
    from tmpqdm.calibration import CalibrationSet
    from tmpqdm.scores import Score
    from tmpqdm.sensitivity import Sensitivity
    from tmpqdm.solver import PrecisionSolver

Init = Literal["sensitivity", "paper", "random"]


@dataclasses.dataclass(frozen=True)
class SearchConfig:
    """How the space is searched; the defaults are the published ones but for the start."""

    population: int = 50
    generations: int = 20
    top_k: int = 10
    """parents: the best of all generations before"""
    mutation: float = 0.25
    """probability that a gene of a mutation is redrawn"""
    crossovers: float = 0.2
    """share of a generation"""
    mutations: float = 0.5
    """share of a generation; the rest is random"""
    init: Init = "sensitivity"
    finalists: int = 10
    """candidates that are scored again on fresh noise"""
    final_images: tuple[int, ...] = ()
    """pictures of the final scores, ascending: after each round the better half goes on; (): the score's own number"""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("population", "generations", "top_k", "finalists"):
            if getattr(self, name) < 1:
                raise InputError(f"field {name}", found=getattr(self, name), expected="at least 1")
        if self.init not in ("sensitivity", "paper", "random"):
            raise InputError("field init", found=self.init, expected="sensitivity, paper or random")

    @property
    def evaluations(self) -> int:
        """Candidates that are scored."""
        return self.population * self.generations


@dataclasses.dataclass(frozen=True)
class SearchResult:
    """What a search found."""

    plan: Plan
    evaluations: list[Evaluation]
    """all scored candidates, in order"""
    finalists: list[dict[str, Any]]
    """rank, genome, timesteps, search score, fresh score, BitOps of an image; best first"""
    rungs: list[Rung]
    """of the final scores"""
    correlation: float | None
    """Spearman's, between search and fresh scores of the finalists"""
    space: SearchSpace
    crowded: int
    """places that crossover or mutation could not fill with a new candidate within the budget"""


def search(
    solver: "PrecisionSolver",
    groups: TimestepGroups,
    cost: CostModel,
    score: "Score",
    budget: Budget | None = None,
    **options: Any,
) -> Plan:
    """The plan that `find` finds; takes its options, and the fields of `SearchConfig`."""
    return find(solver, groups, cost, score, budget, **options).plan


def find(
    solver: "PrecisionSolver",
    groups: TimestepGroups,
    cost: CostModel,
    score: "Score",
    budget: Budget | None = None,
    *,
    config: SearchConfig | None = None,
    data: "CalibrationSet | None" = None,
    sensitivity: "Sensitivity | None" = None,
    resume: Path | str | None = None,
    join: bool = False,
    name: str = "tmpqdm",
    mode: Literal["joint", "timesteps", "bits"] = "joint",
    per_step: bool = False,
    timesteps: Sequence[int] | None = None,
    bits: Mapping[str, Mapping[str, int]] | None = None,
    say: Callable[[str], None] = lambda text: None,
    **fields: Any,
) -> SearchResult:
    """Searches.

    Args:
        solver: calibrated.
        groups: of timesteps.
        cost: of the solver's network.
        score: smaller is better.
        budget: None: no limit.
        config: or its fields as keywords.
        data: calibration inputs for the sensitivities of the start.
        sensitivity: measured before; else a sweep is made from `data` when the start needs one.
        resume: storage of Optuna: a file of JSON lines or a database address. The same call goes on where another one
            was stopped, with the same result.
        join: other workers use the same storage at the same time.
        name: of the search in the storage.
        mode: what is searched.
        per_step: every step has bits of its own.
        timesteps, bits: of what is not searched, see `SearchSpace`.

    Raises:
        InputError: options or a budget that do not fit, or a storage that holds another search.
        WorkError: no candidate has a finite score.
    """
    config = dataclasses.replace(config or SearchConfig(), **fields)
    space = SearchSpace(
        solver,
        groups,
        cost,
        budget,
        search_timesteps=mode != "bits",
        search_bits=mode != "timesteps",
        per_step=per_step,
        timesteps=timesteps,
        bits=bits,
    )
    start = start_genomes(space, config, data, sensitivity)
    sampler = EvolutionSampler(
        space.space(start),
        population=config.population,
        top_k=config.top_k,
        mutation=config.mutation,
        seed=config.seed,
        crossovers=config.crossovers,
        mutations=config.mutations,
        start_mutation=None if config.init == "random" else 0.1,
    )

    def evaluate(genome: Genome) -> tuple[float, Mapping[str, Any]]:
        found, reason = evaluate_genome(space, genome, score)
        return found, ({"reason": reason} if reason else {})

    study = open_study(resume, name, sampler, alone=not join)
    described = {
        "model": solver.model_hash,
        "genes": list(space.genes),
        "edges": list(groups.edges),
        "bits": list(solver.bits),
        "limits": [str(limit) for limit in dataclasses.astuple(space.limits)],
        "config": {k: v for k, v in dataclasses.asdict(config).items() if k not in ("finalists", "final_images")},
        "score": score.describe(),
        "start": [list(genome) for genome in start],
    }
    found = run_search(
        study, sampler, evaluate, config.evaluations, description=described, alone=not join, label=f"search {name}"
    )
    finite = [e for e in found if e.fitness < float("inf")]
    if not finite:
        reasons = sorted({e.notes.get("reason", "not finite") for e in found})
        raise WorkError(f"none of {len(found)} candidates has a finite score: {'; '.join(reasons[:3])}")
    if sampler.crowded:
        warnings.warn(
            f"{sampler.crowded} candidates were drawn at random: crossover and mutation gave nothing new within the "
            "budget",
            stacklevel=2,
        )
    unique: dict[Genome, Evaluation] = {}
    for evaluation in finite:
        unique.setdefault(evaluation.genome, evaluation)
    ranked = sorted(unique.values(), key=lambda e: e.fitness)[: config.finalists]  # equal ones: the older first
    say(f"{len(ranked)} finalists on fresh noise")
    rounds = config.final_images or (score.images,)
    fresh_seed = score.seed + 1
    halving = successive_halving(
        ranked, lambda e, images: evaluate_genome(space, e.genome, score, images, fresh_seed)[0], rounds
    )
    fresh = {place: value for rung in halving.rungs for place, value in rung.values.items()}
    table = [
        {
            "rank": rank,
            "genome": list(e.genome),
            "timesteps": list(space.decode(e.genome)[0]),
            "search score": e.fitness,
            "fresh score": fresh[ranked.index(e)],
            "bitops": plan_bitops(space, e.genome),
        }
        for rank, e in enumerate(halving.ranked)
    ]
    best = halving.ranked[0]
    scores = (
        {**score.describe(), "value": best.fitness, "role": "search"},
        {
            **score.describe(),
            "n": rounds[-1],
            "seed": fresh_seed,
            "value": fresh[ranked.index(best)],
            "role": "fresh noise",
        },
    )
    plan = make_plan(space, best.genome, score, scores, config.seed)
    correlation = rank_correlation([e.fitness for e in ranked], [fresh[i] for i in range(len(ranked))])
    return SearchResult(plan, found, table, halving.rungs, correlation, space, sampler.crowded)


def find_front(
    solver: "PrecisionSolver",
    groups: TimestepGroups,
    cost: CostModel,
    score: "Score",
    budgets: Sequence[Budget],
    *,
    name: str = "tmpqdm",
    **options: Any,
) -> list[SearchResult]:
    """A search for every budget, in one storage, with one sweep of sensitivities; see `find`."""
    if not budgets:
        raise InputError("budgets", found="none", expected="at least one")
    options = dict(options)
    config = options.get("config") or SearchConfig()
    init = options.get("init", config.init)
    if options.get("sensitivity") is None and init == "sensitivity" and options.get("mode", "joint") != "timesteps":
        from tmpqdm.sensitivity import sweep

        if options.get("data") is None:
            raise InputError("data", found="none", expected="calibration inputs for the sensitivities of the start")
        options["sensitivity"] = sweep(solver, options["data"])
    return [
        find(solver, groups, cost, score, budget, name=f"{name}-{i}", **options) for i, budget in enumerate(budgets)
    ]


def start_genomes(
    space: SearchSpace, config: SearchConfig, data: "CalibrationSet | None", sensitivity: "Sensitivity | None"
) -> list[Genome]:
    """The genomes that are scored first; those over the budget are left out by the search."""
    first = space.groups.first() if space.search_timesteps else space.timesteps
    if config.init == "random":
        return []
    uniform = space.encode(first, [space.fixed_bits])
    if config.init == "paper" or not space.search_bits:
        return [uniform]
    from tmpqdm.sensitivity import recommended_bits, sweep

    if sensitivity is None:
        if data is None:
            raise InputError("data", found="none", expected="calibration inputs for the sensitivities of the start")
        sensitivity = sweep(space.solver, data)
    limits = space.limits
    per_step, size = limits.per_step(space.groups.n_groups), limits.size_bytes
    bits = recommended_bits(
        space.solver,
        space.cost,
        sensitivity,
        bitops=None if per_step == float("inf") else per_step,
        size=None if size == float("inf") else size,
    )
    start = [space.encode(first, [bits]), uniform]
    if space.search_timesteps:  # half of the first generation: the recommended bits on other timesteps
        rng = random.Random(f"{config.seed}/start")  # noqa: S311 - not for secrets
        lists = dict.fromkeys(space.groups.sample(rng) for _ in range(config.population // 2 - len(start)))
        start += [space.encode(timesteps, [bits]) for timesteps in lists if timesteps != tuple(first)]
    return start


def evaluate_genome(
    space: SearchSpace, genome: Genome, score: "Score", images: int | None = None, seed: int | None = None
) -> tuple[float, str]:
    """Switches the solver and scores; (value, reason when it is infinite)."""
    timesteps, steps = space.decode(genome)
    return evaluate_settings(space.solver, timesteps, steps, score, images, seed)


def evaluate_settings(
    solver: "PrecisionSolver",
    timesteps: Sequence[int],
    steps: Sequence[Mapping[str, Mapping[str, int]]],
    score: "Score",
    images: int | None = None,
    seed: int | None = None,
) -> tuple[float, str]:
    """The score of timesteps and bits (one set, or one a step), all by switching."""
    solver.set_bits(steps[0])
    at = dict(zip(timesteps, steps, strict=True)) if len(steps) > 1 else {}

    def switch(timestep: int) -> None:
        solver.set_bits(at[timestep])

    scored = score(solver.network, timesteps, images=images, seed=seed, before=switch if at else None)
    return float(scored.value), scored.reason


def plan_bitops(space: SearchSpace, genome: Genome) -> int:
    """BitOps of one image over all steps."""
    timesteps, steps = space.decode(genome)
    return space.cost.bitops(steps[0] if len(steps) == 1 else steps, timesteps)


def make_plan(space: SearchSpace, genome: Genome, score: Any, scores: Sequence[Mapping[str, Any]], seed: int) -> Plan:
    """The plan of a genome; `score.sampling` tells the noise schedule and the sampler."""
    timesteps, steps = space.decode(genome)
    return plan_of(space.solver, space.cost, timesteps, steps, score.sampling, scores=scores, seed=seed)


def plan_of(
    solver: "PrecisionSolver",
    cost: CostModel,
    timesteps: Sequence[int],
    steps: Sequence[Mapping[str, Mapping[str, int]]],
    sampling: Any,
    *,
    scores: Sequence[Mapping[str, Any]] = (),
    seed: int = 0,
) -> Plan:
    """A plan of timesteps and bits (one set, or one a step).

    Args:
        sampling: `tmpqdm.sampling.Sampling`: noise schedule, prediction, sampler, where the last step goes.
    """
    bits: BitsMap = {name: dict(genes) for name, genes in largest_bits([dict(step) for step in steps]).items()}
    total = cost.bitops(steps[0] if len(steps) == 1 else list(steps), list(timesteps))
    per_step = total / len(timesteps)
    return Plan(
        timesteps=tuple(timesteps),
        bits=bits,
        per_step_bits=None
        if len(steps) == 1
        else tuple(
            {"timestep": t, "bits": {name: dict(genes) for name, genes in step.items()}}
            for t, step in zip(timesteps, steps, strict=True)
        ),
        model={
            "class": type(solver.network).__name__,
            "hash": solver.model_hash,
            "parameters": cost.other_parameters + sum(layer.weights + layer.bias for layer in cost.layers),
        },
        schedule={
            "T": len(sampling.alphas_cumprod),
            "betas_hash": betas_hash(sampling.alphas_cumprod),
            "prediction_type": sampling.prediction,
        },
        sampler=sampling.sampler,
        final_alpha=float(sampling.final_alpha),
        cost={
            "bitops": total,
            "bitops_per_step": per_step,
            "full_precision_per_step": cost.full_precision,
            "size_bytes": cost.size_bytes([dict(step) for step in steps]),
            "stored_bytes": cost.size_bytes(bits),
            "read_bytes_per_step": [cost.read_bytes(step) for step in steps],
        },
        scores=tuple(dict(entry) for entry in scores),
        solver={**dataclasses.asdict(solver.settings), **solver.calibrated},
        seed=seed,
        package_version=importlib.metadata.version("tmpqdm"),
    )
