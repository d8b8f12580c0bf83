"""The evolutionary search as an Optuna sampler, so that storage, resume and parallel workers are Optuna's.

Trial i belongs to generation i // population. Generation 0 is the start genomes and random legal ones. In every later
generation a share (by default half) are crossovers of two of the best genomes evaluated before it, another share
(by default half) mutations of one, the rest random. A genome over the budget or already seen is drawn again; when that
fails too often, a random legal one takes its place. What is drawn for trial i depends on the seed, on i, and on the
trials before it.
"""

import contextlib
import dataclasses
import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from papercore.errors import InputError
from papercore.progress import Progress
from papercore.rundir import drop_torn_line
from papercore.search.operators import Genome, crossover, keep_best, mutate, repair

if TYPE_CHECKING:
    from optuna.study import Study

ALIVE = (TrialState.COMPLETE, TrialState.RUNNING, TrialState.PRUNED)


@dataclasses.dataclass(frozen=True)
class Space:
    """What is searched.

    Args:
        genes: name of every gene and its choices, from the most to the least expensive (repair moves that way).
        fits: whether a genome is within the budget.
        start: genomes to evaluate first; those that do not fit are left out.
        costless: genes that the budget does not depend on: repair leaves them alone.
        within: whether a genome is within a share of the budget; random genomes then aim at 0.85 to 1 of it.
    """

    genes: Mapping[str, Sequence[int | float | str | None]]
    fits: Callable[[Genome], bool] = lambda genome: True
    start: Sequence[Genome] = ()
    costless: Collection[str] = ()
    within: Callable[[Genome, float], bool] | None = None

    def __post_init__(self) -> None:
        if not self.genes or any(len(choices) == 0 for choices in self.genes.values()):
            raise InputError(
                "search space", found="a gene without choices, or no gene", expected="choices for every gene"
            )
        cheapest = tuple(len(choices) - 1 for choices in self.genes.values())
        if not self.fits(cheapest):
            raise InputError("budget", found="one below the cheapest configuration", expected="a larger one")

    def values(self, genome: Genome) -> dict[str, Any]:
        return {name: choices[i] for (name, choices), i in zip(self.genes.items(), genome, strict=True)}

    def drawn(self, generator: random.Random) -> Genome:
        """A random genome, within the budget or not."""
        return tuple(generator.randrange(len(choices)) for choices in self.genes.values())

    def order(self, generator: random.Random) -> list[int]:
        """The genes that cost, in random order."""
        costly = [i for i, name in enumerate(self.genes) if name not in self.costless]
        return generator.sample(costly, len(costly))

    def repaired(
        self, genome: Sequence[int], order: Sequence[int], fits: Callable[[Genome], bool] | None = None
    ) -> Genome:
        """The genome made cheaper, gene by gene in this order, until it fits."""
        counts = [len(choices) for choices in self.genes.values()]
        return repair(genome, order, counts, fits or self.fits)[0]

    def random(self, generator: random.Random) -> Genome:
        """A random genome within the budget: uniform, repaired in random order."""
        order = self.order(generator)
        genome = self.drawn(generator)
        if self.within is None:
            return self.repaired(genome, order)
        within, share = self.within, generator.uniform(0.85, 1)
        tight = self.repaired(genome, order, lambda candidate: within(candidate, share))
        return tight if within(tight, share) else self.repaired(genome, order)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """One evaluated genome."""

    genome: Genome
    fitness: float
    notes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """what the evaluation had to say beside it"""


class EvolutionSampler(BaseSampler):
    """See the module.

    Args:
        space: what is searched.
        population: trials of a generation.
        top_k: how many of the best are parents.
        mutation: probability that a gene is redrawn in a mutation.
        seed: of everything random.
        tries: how often a place is drawn again, in populations.
        crossovers, mutations: shares of a generation; what they leave is random.
        start_mutation: fill the second half of generation 0 with mutations of the first start genome, of this
            probability a gene, repaired; None: with random genomes.
    """

    def __init__(
        self,
        space: Space,
        *,
        population: int,
        top_k: int,
        mutation: float,
        seed: int,
        tries: int = 10,
        crossovers: float = 0.5,
        mutations: float = 0.5,
        start_mutation: float | None = None,
    ) -> None:
        if population < 1 or top_k < 1 or not 0 <= mutation <= 1:
            raise InputError("search", found=f"{population}, {top_k}, {mutation}", expected="population, top_k >= 1")
        self.space, self.population, self.top_k = space, population, top_k
        if min(crossovers, mutations) < 0 or crossovers + mutations > 1 + 1e-9:
            raise InputError("shares", found=f"{crossovers}, {mutations}", expected="at least 0, together at most 1")
        self.mutation, self.seed, self.tries = mutation, seed, tries
        self.crossovers, self.mutations, self.start_mutation = crossovers, mutations, start_mutation
        self.crowded = 0
        """how often a place could not be filled by crossover or mutation and got a random genome"""

    # ---- Optuna's interface

    def infer_relative_search_space(self, study: "Study", trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {name: CategoricalDistribution(list(choices)) for name, choices in self.space.genes.items()}

    def sample_relative(
        self,
        study: "Study",
        trial: FrozenTrial,
        search_space: dict[str, BaseDistribution],
    ) -> dict[str, Any]:
        before = [t for t in study.get_trials(deepcopy=False, states=ALIVE) if t.number < trial.number]
        genome = self.propose(len(before), [self.evaluation(t) for t in before])
        return self.space.values(genome)

    def sample_independent(
        self, study: "Study", trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        raise InputError("parameter", found=param_name, expected=f"one of {', '.join(self.space.genes)}")

    # ---- what it does

    def evaluation(self, trial: FrozenTrial) -> tuple[float | None, Genome]:
        """(fitness, genome) of a trial; fitness None while it runs, genome () while its worker writes it."""
        genome: Genome = ()
        if self.space.genes.keys() <= trial.params.keys():
            genome = tuple(list(choices).index(trial.params[name]) for name, choices in self.space.genes.items())
        return (trial.value if trial.state == TrialState.COMPLETE else None), genome

    def propose(self, index: int, before: Sequence[tuple[float | None, Genome]]) -> Genome:
        """The genome of trial `index`, given those before it in order."""
        generator = random.Random(f"{self.seed}/{index}")  # noqa: S311 - not for secrets
        seen = {genome for _, genome in before}
        start = [genome for genome in self.space.start if self.space.fits(genome)]
        if index < len(start):
            return start[index]
        generation, place = divmod(index, self.population)
        first = generation * self.population
        scored = [(fitness, genome) for fitness, genome in before[:first] if fitness is not None]
        parents = [genome for _, genome in keep_best([], scored, self.top_k)]
        counts = [len(choices) for choices in self.space.genes.values()]
        if not generation and start and self.start_mutation is not None and place >= self.population // 2:
            for _ in range(self.tries * self.population):
                draws = self.space.drawn(generator)
                child = mutate(start[0], draws, [generator.random() for _ in counts], self.start_mutation)
                child = self.space.repaired(child, self.space.order(generator))
                if child not in seen:
                    return child
        first_mutation = round(self.crossovers * self.population) if self.crossovers != 0.5 else self.population // 2
        first_random = first_mutation + round(self.mutations * self.population)
        if self.crossovers + self.mutations >= 1 - 1e-9:
            first_random = self.population
        crowded = bool(parents) and place < first_random
        for _ in range(self.tries * self.population if crowded else 0):
            if place < first_mutation:
                a, b = generator.choice(parents), generator.choice(parents)
                child = crossover(a, b, [generator.random() for _ in counts])
            else:
                parent, draws = generator.choice(parents), [generator.randrange(n) for n in counts]
                child = mutate(parent, draws, [generator.random() for _ in counts], self.mutation)
            if child not in seen and self.space.fits(child):
                return child
        self.crowded += crowded
        for _ in range(self.tries * self.population):
            child = self.space.random(generator)
            if child not in seen:
                return child
        return self.space.random(generator)  # the space is exhausted: a repetition


def open_study(storage: str | Path | None, name: str, sampler: BaseSampler, *, alone: bool = True) -> "Study":
    """The study `name` in a storage: None (memory), a database URL, or a file of JSON lines that is only appended to.

    A last line of such a file that a crash has torn is cut off when this worker is `alone` with it.

    Raises:
        InputError: the storage cannot be opened.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    opened: Any = storage
    if storage is not None and "://" not in str(storage):
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        path = Path(storage)
        if path.is_dir():
            raise InputError("is a folder", where=path, expected="a file, or a database URL")
        path.parent.mkdir(parents=True, exist_ok=True)
        if alone:
            drop_torn_line(path)
        opened = JournalStorage(JournalFileBackend(str(path)))
    try:
        return optuna.create_study(storage=opened, study_name=name, sampler=sampler, load_if_exists=True)
    except Exception as error:
        raise InputError("search storage", where=storage, found=str(error), expected="a storage of Optuna") from error


def run_search(
    study: "Study",
    sampler: EvolutionSampler,
    evaluate: Callable[[Genome], float | tuple[float, Mapping[str, Any]]],
    evaluations: int,
    *,
    description: Mapping[str, Any],
    alone: bool = True,
    label: str = "search",
) -> list[Evaluation]:
    """Evaluates until `evaluations` are finished, all workers together; gives them in order.

    A worker that was killed leaves an unfinished trial. When this worker is alone, such trials are discarded first, so
    that the search goes on exactly as if it had not been interrupted; their place is drawn again.

    Args:
        evaluate: genome -> fitness, smaller is better (NaN counts as the worst), perhaps with notes to keep.
        description: of the search (space, seed, limit); a storage that holds another search is refused.
        alone: False while other workers use the same storage.

    Raises:
        InputError: the storage holds another search.
    """
    with connected(study):
        known = study.user_attrs.get("description")
        if known is None:
            study.set_user_attr("description", dict(description))
        else:
            for key in sorted(set(known) | set(description)):
                if known.get(key) != description.get(key):
                    raise InputError(
                        f"search setting {key}",
                        found=repr(known.get(key)),
                        expected=repr(description.get(key)),
                        hint="this storage holds another search",
                    )
        if alone:
            for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING, TrialState.WAITING)):
                study.tell(trial.number, state=TrialState.FAIL)

        def finished() -> list[FrozenTrial]:
            return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))

        done = len(finished())
        with Progress(label, evaluations, start=done) as progress:
            while len(finished()) < evaluations:
                trial = study.ask()
                for name in sampler.space.genes:
                    trial.suggest_categorical(name, list(sampler.space.genes[name]))
                _, genome = sampler.evaluation(study.trials[trial.number])
                value = evaluate(genome)
                if isinstance(value, tuple):
                    value, notes = value
                    for name, note in notes.items():
                        trial.set_user_attr(name, note)
                study.tell(trial, value if value == value else float("inf"))
                progress.advance(f"best {study.best_value:.4g}")
        return [
            Evaluation(sampler.evaluation(trial)[1], float(trial.value or 0.0), dict(trial.user_attrs))
            for trial in finished()
        ]


@contextlib.contextmanager
def connected(study: "Study") -> Iterator[None]:
    """On leaving, the connections of a database storage are closed; they are opened again when they are needed."""
    try:
        yield
    finally:
        storage: Any = study._storage
        engine = getattr(getattr(storage, "_backend", storage), "engine", None)
        if engine is not None:
            engine.dispose()
