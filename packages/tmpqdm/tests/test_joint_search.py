"""The joint search on a small network: budgets, starts, resume, several workers, fronts."""

import dataclasses
import math
import random
import warnings
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel
from papercore.errors import InputError, WorkError
from tmpqdm.calibration import collect_calibration
from tmpqdm.cost import CostModel
from tmpqdm.groups import TimestepGroups
from tmpqdm.joint import SearchConfig, find, find_front, search, start_genomes
from tmpqdm.plan import Plan
from tmpqdm.sampling import Sampling
from tmpqdm.scores import PairedScore, Scored
from tmpqdm.sensitivity import recommended_bits, sweep
from tmpqdm.solver import PrecisionSolver
from tmpqdm.space import Budget, SearchSpace

SMALL = SearchConfig(population=6, generations=2, top_k=3, finalists=3)


def unet() -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=None,
    ).eval()


@pytest.fixture(scope="module")
def setting() -> SimpleNamespace:
    model, scheduler = unet(), DDIMScheduler(1000, beta_end=0.02, clip_sample=False)
    solver = PrecisionSolver.from_model(model, bits=(8, 6, 4))
    data = collect_calibration(model, scheduler, samples=4, steps=10, use=4, seed=0)
    solver.calibrate(data, method="minmax", batch_size=4)
    cost = CostModel.trace(model, splits=solver.splits)
    score = PairedScore(Sampling.of(model, scheduler), model, (0, 100, 300, 500, 700, 900), images=4)
    groups = TimestepGroups.quadratic(4)
    return SimpleNamespace(**locals())


def run(s, **options):
    options = {"budget": Budget(bitops_per_step="uniform:6"), "config": SMALL, "data": s.data} | options
    return find(s.solver, s.groups, s.cost, s.score, **options)


def test_a_search_keeps_to_its_budget_and_tells_what_it_scored(setting):
    s = setting
    result = run(s)
    plan, space = result.plan, result.space
    limit = s.cost.bitops(s.solver.uniform(6))
    assert len(result.evaluations) == SMALL.evaluations
    assert len({e.genome for e in result.evaluations}) == SMALL.evaluations
    assert all(space.fits(e.genome) for e in result.evaluations)
    assert plan.cost["bitops_per_step"] <= limit
    assert plan.cost["bitops"] == s.cost.bitops(plan.bits, plan.timesteps)
    assert s.groups.contains(plan.timesteps)
    roles = {entry["role"]: entry for entry in plan.scores}
    assert roles["fresh noise"]["seed"] == s.score.seed + 1
    # the first candidate is the start: sensitivities' bits on the first timesteps
    timesteps, (bits,) = space.decode(result.evaluations[0].genome)
    assert timesteps == s.groups.first()
    expected = recommended_bits(s.solver, s.cost, sweep(s.solver, s.data), bitops=limit)
    assert all(bits[name][gene] == expected[name][gene] for name, gene in space.bit_genes)
    # what is scored is what the plan's network gives
    network = s.solver.apply(plan)
    again = s.score(network, plan.timesteps, seed=s.score.seed + 1).value
    assert again == pytest.approx(roles["fresh noise"]["value"], rel=1e-4)


def test_search_gives_a_plan_that_survives_its_file(setting, tmp_path):
    s = setting
    plan = search(s.solver, s.groups, s.cost, s.score, config=SMALL, data=s.data)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json").bits == plan.bits
    plan.check_model(s.solver.model_hash)


@pytest.mark.parametrize("mode", ["timesteps", "bits"])
@pytest.mark.parametrize("init", ["sensitivity", "paper", "random"])
def test_a_part_can_be_searched_alone(setting, mode, init):
    s = setting
    result = run(s, mode=mode, init=init)
    uniform = s.solver.uniform(6)
    if mode == "timesteps":
        assert all(dict(genes) == dict(uniform[name]) for name, genes in result.plan.bits.items())
        assert len({tuple(f["timesteps"]) for f in result.finalists}) > 1
    else:
        assert result.plan.timesteps == s.groups.first()
    if init == "paper":
        _, (bits,) = result.space.decode(result.evaluations[0].genome)
        assert all(dict(genes) == dict(uniform[name]) for name, genes in bits.items())


def test_steps_can_have_bits_of_their_own(setting):
    s = setting
    result = run(s, per_step=True, init="random")
    plan = result.plan
    assert plan.per_step_bits is not None
    assert len({str(step["bits"]) for step in plan.per_step_bits}) > 1
    assert plan.cost["bitops_per_step"] <= s.cost.bitops(s.solver.uniform(6))
    again = s.score(s.solver.apply(plan), plan.timesteps, seed=s.score.seed + 1).value
    assert again == pytest.approx(plan.scores[1]["value"], rel=1e-4)


def test_a_stopped_search_goes_on_to_the_same_result(setting, tmp_path):
    s = setting
    whole = run(s)

    class Dying:
        images, seed, sampling = s.score.images, s.score.seed, s.score.sampling
        calls = 0

        def describe(self):
            return s.score.describe()

        def __call__(self, *args, **options):
            self.calls += 1
            if self.calls > 7:
                raise KeyboardInterrupt
            return s.score(*args, **options)

    dying = SimpleNamespace(**(vars(s) | {"score": Dying()}))
    with pytest.raises(KeyboardInterrupt):
        run(dying, resume=tmp_path / "run.jsonl")
    resumed = run(s, resume=tmp_path / "run.jsonl")
    assert [(e.genome, e.fitness) for e in resumed.evaluations] == [(e.genome, e.fitness) for e in whole.evaluations]
    assert resumed.plan == whole.plan
    with pytest.raises(InputError, match="another search"):
        run(s, resume=tmp_path / "run.jsonl", seed=5)
    lines = (tmp_path / "run.jsonl").read_text().splitlines()
    (tmp_path / "run.jsonl").write_text("\n".join(lines) + '\n{"op_code": 4, "wor')  # a torn last line
    assert run(s, resume=tmp_path / "run.jsonl").plan == whole.plan


def test_a_front_over_several_budgets(setting):
    s = setting
    budgets = [Budget(bitops_per_step=f"uniform:{bits}") for bits in (6, 8)] + [Budget(size_bytes="uniform:6")]
    results = find_front(s.solver, s.groups, s.cost, s.score, budgets, config=SMALL, data=s.data)
    assert results[0].plan.cost["bitops"] <= results[1].plan.cost["bitops"]
    assert results[2].plan.cost["size_bytes"] <= s.cost.size_bytes(s.solver.uniform(6))


def test_candidates_that_are_not_finite_are_kept_with_the_reason(setting):
    s = setting

    class Broken:
        images, seed, sampling = 2, 0, s.score.sampling

        def __init__(self, good: int) -> None:
            self.calls, self.good = 0, good

        def describe(self):
            return {"metric": "broken"}

        def __call__(self, *args, **options):
            self.calls += 1
            return Scored(float(self.calls)) if self.calls <= self.good else Scored(math.inf, "2 of 2 images")

    result = find(s.solver, s.groups, s.cost, Broken(3), config=SMALL, init="random")
    assert [e.notes.get("reason") for e in result.evaluations][:4] == [None, None, None, "2 of 2 images"]
    with pytest.raises(WorkError, match="none of 12 candidates has a finite score: 2 of 2 images"):
        find(s.solver, s.groups, s.cost, Broken(0), config=SMALL, init="random")


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        (Budget(bitops_per_step=10), "bitops_per_step: found .?10.*at least"),
        (Budget(bitops=10), "budget bitops"),
        (Budget(size_bytes=10), "budget size_bytes"),
        (Budget(bitops_per_step="uniform:7"), "uniform:8, uniform:6, uniform:4"),
        (Budget(bitops_per_step=-1), "above 0"),
        (Budget(steps=3), "4 groups"),
    ],
)
def test_budgets_that_cannot_be_kept(setting, budget, words):
    with pytest.raises(InputError, match=words):
        run(setting, budget=budget)


def test_options_that_are_wrong(setting):
    for options, words in (
        ({"init": "best"}, "init"),
        ({"population": 0}, "population"),
        ({"data": None}, "data"),
        ({"mode": "bits", "timesteps": (0, 1, 2, 3)}, "one in every group"),
    ):
        with pytest.raises(InputError, match=words):
            run(setting, **options)


def test_genomes_and_settings_are_two_ways_to_say_the_same(setting):
    s = setting
    space = SearchSpace(s.solver, s.groups, s.cost, Budget(bitops="uniform:6"), per_step=True)
    genome = space.space().random(random.Random(0))
    timesteps, steps = space.decode(genome)
    assert space.encode(timesteps, steps) == genome
    assert len(steps) == 4
    assert space.log10_size() > s.groups.log10_size()
    (start,) = start_genomes(space, dataclasses.replace(SMALL, init="paper"), None, None)
    assert space.fits(start)
    with pytest.raises(InputError, match="gene t0"):
        space.encode((500, 600, 700, 900), steps)


def test_an_exhausted_space_is_filled_up_and_said(setting):
    s = setting
    groups = TimestepGroups((0, 2, 4), 4)
    score = PairedScore(
        dataclasses.replace(s.score.sampling, alphas_cumprod=s.score.sampling.alphas_cumprod[:4]),
        s.model,
        (0, 3),
        images=2,
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = find(
            s.solver, groups, s.cost, score, config=dataclasses.replace(SMALL, init="paper"), mode="timesteps"
        )
    assert len(result.evaluations) == SMALL.evaluations
    assert len({e.genome for e in result.evaluations}) <= 4
    assert any("nothing new" in str(w.message) for w in caught)
