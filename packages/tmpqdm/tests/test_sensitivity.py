"""Damages of single genes, and the multiple-choice knapsack against all choices."""

import itertools

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from papercore.errors import InputError
from tmpqdm.calibration import collect_calibration
from tmpqdm.cost import CostModel
from tmpqdm.sensitivity import Sensitivity, knapsack, recommended_bits, summary, sweep
from tmpqdm.solver import PrecisionSolver
from tmpqdm.synthetic import tiny_unet


@pytest.fixture(scope="module")
def swept():
    model = tiny_unet()
    data = collect_calibration(model, DDPMScheduler(), samples=2, steps=10, use=3)
    solver = PrecisionSolver.from_model(model, bits=(8, 4), pin={"first": 8})
    solver.calibrate(data, method="minmax", batch_size=2)
    return solver, data, sweep(solver, data, samples=6), CostModel.trace(model, splits=solver.splits)


def test_a_damage_is_that_of_one_gene_alone(swept):
    solver, data, found, _ = swept
    name = "up_blocks.0.resnets.0.conv1"
    with torch.no_grad(), solver.full_precision() as network:
        exact = network(data.x, data.t)[0]
        solver.layers[name].use(w=4)
        changed = network(data.x, data.t)[0]
        solver.layers[name].use()
    assert found.damage[name]["w"][4] == pytest.approx(float((changed - exact).square().mean()), rel=1e-4)
    assert found.power == pytest.approx(float(exact.square().mean()), rel=1e-4)


def test_pinned_genes_have_no_damage_and_fewer_bits_do_more(swept):
    solver, _, found, _ = swept
    pinned = next(op for op in solver.ops if op.pinned)
    assert pinned.name not in found.damage
    totals = {b: sum(row[b] for genes in found.damage.values() for row in genes.values()) for b in (8, 4)}
    assert 0 < totals[8] < totals[4] / 20
    rows = summary(found)
    assert rows[0]["4 bits"] == max(row["4 bits"] for row in rows)


def test_recommended_bits_keep_to_the_budget_and_beat_uniform_ones(swept):
    solver, _, found, cost = swept
    few, many = cost.bitops(solver.uniform(4)), cost.bitops(solver.uniform(8))
    damages = []
    for share in (0.0, 0.3, 0.6, 1.0):
        bits = recommended_bits(solver, cost, found, bitops=few + share * (many - few))
        assert cost.bitops(solver.complete(bits)) <= few + share * (many - few)
        damages.append(sum(found.damage[n][g][bits[n][g]] for n, genes in found.damage.items() for g in genes))
    assert damages == sorted(damages, reverse=True)
    assert bits == solver.uniform(8) or damages[-1] <= sum(
        row[8] for genes in found.damage.values() for row in genes.values()
    )
    half = (cost.size_bytes(solver.uniform(4)) + cost.size_bytes(solver.uniform(8))) // 2
    assert cost.size_bytes(recommended_bits(solver, cost, found, size=half)) <= half
    both = recommended_bits(solver, cost, found, size=half, bitops=(few + many) / 2)
    assert cost.size_bytes(both) <= half and cost.bitops(both) <= (few + many) / 2
    with pytest.raises(InputError, match=r"budget.*at least"):
        recommended_bits(solver, cost, found, bitops=few - 1)


def test_files(swept, tmp_path):
    _, _, found, _ = swept
    found.save(tmp_path / "s.json")
    assert Sensitivity.load(tmp_path / "s.json") == found
    (tmp_path / "s.json").write_text('{"damage": {"a": 3}}')
    with pytest.raises(InputError, match=r"s.json: sensitivities"):
        Sensitivity.load(tmp_path / "s.json")


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 4), st.floats(0, 1), st.booleans())
def test_the_knapsack_is_near_the_best_of_all_choices(seed, tables, share, two):
    rng = np.random.default_rng(seed)
    made = [(rng.exponential(size=4), rng.integers(1, 50, (4, 2)).astype(float)) for _ in range(tables)]
    low, high = (sum(getattr(cost, kind)(0) for _, cost in made) for kind in ("min", "max"))
    limits = low + share * (high - low)
    if not two:
        limits[1] = np.inf
    options = [
        (sum(d[i] for (d, _), i in zip(made, pick, strict=True)),
         sum(c[i] for (_, c), i in zip(made, pick, strict=True)), pick)
        for pick in itertools.product(range(4), repeat=tables)
    ]  # fmt: skip
    legal = [(damage, pick) for damage, cost, pick in options if (cost <= limits).all()]
    try:
        chosen = tuple(knapsack(made, limits))
    except InputError:
        assert two  # two limits that pull apart may be refused, one never
        return
    damage = sum(d[i] for (d, _), i in zip(made, chosen, strict=True))
    assert chosen in [pick for _, pick in legal]
    worst = max(d for d, _ in legal)
    best = min(d for d, _ in legal)
    assert damage <= best + max(d.max() - d.min() for d, _ in made) + 1e-9  # at most one table off the hull
    assert damage <= worst


def test_without_a_limit_every_damage_is_the_least():
    tables = [(np.array([3.0, 1.0]), np.array([[1.0], [9.0]])), (np.array([0.0, 1.0]), np.array([[5.0], [1.0]]))]
    assert knapsack(tables, [np.inf]) == [1, 0]
    assert knapsack(tables, [10]) == [1, 1]
