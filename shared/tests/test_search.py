"""The evolutionary search: operators against goldens, budgets, resume, several workers."""

import itertools
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from papercore.errors import InputError
from papercore.search import (
    EvolutionSampler,
    Space,
    crossover,
    keep_best,
    mutate,
    open_study,
    repair,
    run_search,
)

GOLDEN = json.loads((Path(__file__).parent / "golden" / "evolution.json").read_text())


@pytest.mark.parametrize("case", GOLDEN["operators"], ids=lambda c: str(c["n_bit_genes"]))
def test_operators(case):
    for step in case["crossover"]:
        a, b = case["parents"][step["parent_a"]], case["parents"][step["parent_b"]]
        for kind in "tb":
            assert list(crossover(a[kind], b[kind], step[f"u_{kind}"])) == step[f"child_{kind}"]
    for step in case["mutation"]:
        parent = case["parents"][step["parent"]]
        for kind in "tb":
            child = mutate(parent[kind], step[f"draw_{kind}"], step[f"u_{kind}"], step["prob"])
            assert list(child) == step[f"child_{kind}"]
    kept: list[tuple[float, int]] = []
    for generation, expected in zip(case["topk"]["generations"], case["topk"]["kept_after_each"], strict=True):
        kept = keep_best(kept, list(zip(generation["fitness"], generation["ids"], strict=True)), case["topk"]["k"])
        assert [item for _, item in kept] == expected


@pytest.mark.parametrize("case", GOLDEN["repair"]["cases"], ids=lambda c: str(c["budget"]))
def test_repair(case):
    bits, macs = GOLDEN["repair"]["bits"], GOLDEN["repair"]["macs"]

    def cost(genome):
        return sum(m * bits[genome[2 * i]] * bits[genome[2 * i + 1]] for i, m in enumerate(macs))

    genome, feasible = repair(
        case["start"], case["order"], [len(bits)] * len(case["start"]), lambda g: cost(g) <= case["budget"]
    )
    assert list(genome) == case["result"]
    assert feasible == case["feasible"]
    assert cost(genome) == case["cost"]


GENES = {f"g{i}": (0, 1, 2, 3) for i in range(6)}
BUDGET = 9


def fits(genome) -> bool:
    """Earlier choices cost more."""
    return sum(3 - gene for gene in genome) <= BUDGET


SPACE = Space(GENES, fits, start=((2, 2, 2, 2, 2, 2), (0, 0, 0, 0, 0, 0)))
WEIGHTS = (5, 1, 4, 2, 3, 1)


def fitness(genome) -> float:
    return float(sum(w * gene for w, gene in zip(WEIGHTS, genome, strict=True)))


def search(storage, evaluations, *, seed=0, evaluate=fitness, alone=True):
    sampler = EvolutionSampler(SPACE, population=10, top_k=4, mutation=0.2, seed=seed)
    study = open_study(storage, "s", sampler, alone=alone)
    return run_search(study, sampler, evaluate, evaluations, description={"seed": seed}, alone=alone)


def test_it_finds_a_good_genome_within_the_budget():
    found = search(None, 80)
    assert found[0].genome == (2, 2, 2, 2, 2, 2)  # the start that fits; the other costs too much
    assert all(fits(e.genome) for e in found)
    assert len({e.genome for e in found}) == len(found)
    best = min(found, key=lambda e: e.fitness)
    every = sorted(fitness(g) for g in itertools.product(range(4), repeat=6) if fits(g))
    assert best.fitness <= every[len(every) // 200]  # among the best half per cent
    generator = random.Random(0)
    chance = min(fitness(SPACE.random(generator)) for _ in range(80))
    assert best.fitness <= chance
    assert [e.genome for e in search(None, 80)] == [e.genome for e in found]
    assert [e.genome for e in search(None, 80, seed=1)] != [e.genome for e in found]


@pytest.mark.parametrize("kind", ["journal", "database"])
def test_an_interrupted_search_goes_on_as_if_it_had_not_been(tmp_path, kind):
    storage = tmp_path / "log.jsonl" if kind == "journal" else f"sqlite:///{tmp_path / 's.db'}"
    whole = search(None, 40)
    calls = 0

    def dying(genome):
        nonlocal calls
        calls += 1
        if calls > 17:
            raise RuntimeError("killed")
        return fitness(genome)

    with pytest.raises(RuntimeError):
        search(storage, 40, evaluate=dying)
    if kind == "journal":
        with (tmp_path / "log.jsonl").open("ab") as file:
            file.write(b'{"op_code": 5, "trial')  # torn by the crash
    resumed = search(storage, 40)
    assert resumed == whole
    assert search(storage, 40) == whole
    assert search(storage, 45)[:40] == whole
    with pytest.raises(InputError, match="this storage holds another search"):
        search(storage, 40, seed=2)


def test_two_workers_share_one_storage(tmp_path):
    path = str(tmp_path / "log.jsonl")
    search(path, 1)
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    code += f"import test_search; test_search.search({path!r}, 30, alone=False)"
    workers = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    assert [process.wait(120) for process in workers] == [0, 0]
    found = search(path, 30)
    assert 30 <= len(found) <= 31  # the second worker may have been evaluating when the first finished the last
    assert all(fits(e.genome) for e in found)
    assert len({e.genome for e in found}) >= len(found) - 2


def test_a_small_space_is_searched_to_its_end():
    space = Space({"a": (1, 2), "b": (1, 2)})
    sampler = EvolutionSampler(space, population=4, top_k=2, mutation=0.5, seed=0)
    found = run_search(open_study(None, "s", sampler), sampler, lambda g: float(sum(g)), 6, description={})
    assert {e.genome for e in found[:4]} == set(itertools.product(range(2), repeat=2))
    worst = run_search(open_study(None, "n", sampler), sampler, lambda g: float("nan"), 2, description={})
    assert [e.fitness for e in worst] == [float("inf")] * 2


def test_bad_searches_are_named(tmp_path):
    with pytest.raises(InputError, match="budget"):
        Space(GENES, lambda genome: False)
    with pytest.raises(InputError, match="search space"):
        Space({"a": ()})
    with pytest.raises(InputError, match="population"):
        EvolutionSampler(SPACE, population=0, top_k=1, mutation=0.1, seed=0)
    with pytest.raises(InputError, match="is a folder"):
        search(tmp_path, 1)
    with pytest.raises(InputError, match="search storage"):
        search("nonsense://x", 1)


def test_shares_of_a_generation_and_mutations_of_the_start():
    """The published scheme: half mutations, a fifth crossovers, the rest random; generation 0 around the start."""
    space = Space(GENES, lambda genome: sum(genome) >= 4, start=[(1,) * 6])
    sampler = EvolutionSampler(
        space, population=20, top_k=3, mutation=0.2, seed=0, crossovers=0.2, mutations=0.5, start_mutation=0.1
    )
    first = [sampler.propose(i, []) for i in range(20)]
    changed = [sum(a != b for a, b in zip(genome, first[0], strict=True)) for genome in first]
    assert sum(changed[10:]) / 10 < sum(changed[1:10]) / 9 / 2
    before = [(float(sum(genome)), genome) for genome in first]
    later = [sampler.propose(20 + i, before) for i in range(20)]
    assert all(space.fits(genome) for genome in later)
    best = [genome for _, genome in keep_best([], before, 3)]
    mixed = [all(gene in column for gene, column in zip(g, zip(*best, strict=True), strict=True)) for g in later]
    assert all(mixed[:4])  # crossovers have nothing that the parents do not have
    assert not all(mixed[14:])
    with pytest.raises(InputError, match="shares"):
        EvolutionSampler(space, population=4, top_k=1, mutation=0.1, seed=0, crossovers=0.8, mutations=0.4)


def test_repair_leaves_costless_genes_alone_and_random_genomes_aim_below_the_budget():
    genes = {"t": tuple(range(100)), **GENES}

    def cost(genome):
        return sum(3 - gene for gene in genome[1:])

    space = Space(
        genes,
        lambda genome: cost(genome) <= 12,
        costless=("t",),
        within=lambda genome, share: cost(genome) <= 12 * share,
    )
    generator = random.Random(1)
    drawn = [space.random(generator) for _ in range(60)]
    assert all(space.fits(genome) for genome in drawn)
    assert len({genome[0] for genome in drawn}) > 30
    assert {cost(genome) for genome in drawn if cost(genome) > 9} >= {10, 11}
    genome = space.repaired((7, 0, 0, 0, 0, 0, 0), space.order(generator))
    assert genome[0] == 7
    assert cost(genome) == 12


def test_notes_of_an_evaluation_are_kept(tmp_path):
    space = Space(GENES)
    sampler = EvolutionSampler(space, population=4, top_k=2, mutation=0.3, seed=0)
    study = open_study(tmp_path / "study.jsonl", "notes", sampler)

    def evaluate(genome):
        return float("inf"), {"reason": f"sum {sum(genome)}"}

    found = run_search(study, sampler, evaluate, 3, description={})
    assert [e.notes["reason"] for e in found] == [f"sum {sum(e.genome)}" for e in found]
    again = run_search(open_study(tmp_path / "study.jsonl", "notes", sampler), sampler, evaluate, 3, description={})
    assert [e.notes for e in again] == [e.notes for e in found]
