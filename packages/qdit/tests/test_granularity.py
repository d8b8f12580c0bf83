"""The search for group sizes: costs, limits, resume, the command, and that it is worth its time."""

import dataclasses
import json
import sys

import pytest
import qdit
import torch
from papercore.errors import InputError
from qdit.cli import main
from qdit.commands.options import parse_limit
from qdit.config import QDiTConfig
from qdit.granularity import (
    costs,
    frechet_fitness,
    limits_of,
    noise_fitness,
    pareto,
    search_group_sizes,
    sizes_picture,
)
from qdit.original import fold_channel_spread
from qdit.targets import find_targets

CONFIG = QDiTConfig(4, 8, gptq=False)
SMALL = {"menu": (3, 6, 12, 24), "population": 8, "top_k": 4, "iterations": 4, "seed": 0}


@pytest.fixture
def spread(model):
    fold_channel_spread(model, torch.Generator().manual_seed(0))
    return model


def test_costs_are_those_of_every_layer_summed(model):
    targets = find_targets(model, dataclasses.replace(CONFIG, group_size=None))
    sizes = [3, 6, 12, 24, 24, 12, 6, 3]
    cost = costs(targets, CONFIG, sizes)
    groups = sum(t.rows * -(-t.columns // g) for t, g in zip(targets, sizes, strict=True))
    weights = sum(t.rows * t.columns for t in targets)
    assert cost["rescales_per_token"] == groups
    assert cost["bits_per_weight"] == pytest.approx(4 + groups * 20 / weights)
    assert limits_of(targets, CONFIG, 12) == costs(targets, CONFIG, [12] * 8)
    symmetric = dataclasses.replace(CONFIG, w_sym=True)
    assert costs(targets, symmetric, sizes)["bits_per_weight"] == pytest.approx(4 + groups * 16 / weights)


def test_candidates_are_exactly_the_quantised_models(spread, inputs):
    seen = []

    def fitness(candidate):
        seen.append(candidate)
        return qdit.noise_error(spread, candidate, inputs)

    result = search_group_sizes(spread, CONFIG, fitness, limit=12, **SMALL)
    assert len({id(candidate) for candidate in seen}) == 1  # switched, not rebuilt
    for sizes, value in result.evaluations[:5]:
        rebuilt = qdit.quantize(spread, dataclasses.replace(CONFIG, group_size=sizes))
        assert qdit.noise_error(spread, rebuilt, inputs) == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("gptq", [False, True])
def test_searched_sizes_beat_the_uniform_size_of_equal_cost(spread, inputs, gptq):
    config = dataclasses.replace(CONFIG, gptq=gptq)
    options = SMALL | {"iterations": 8}
    result = search_group_sizes(
        spread,
        config,
        noise_fitness(spread, inputs),
        limit=12,
        calibration=inputs,
        held_out=noise_fitness(spread, inputs),
        **options,
    )
    rows = {record["candidate"]: record for record in result.table.records()}
    best, uniform = rows["searched 1"], rows["uniform 12"]
    assert best["fitness"] < uniform["fitness"]
    assert best["held-out fitness"] == best["fitness"]
    assert best["bits/weight"] <= uniform["bits/weight"]
    assert best["rescales/token"] <= uniform["rescales/token"]
    assert result.evaluations[0][0] == dict.fromkeys(result.best, 12)
    assert len(result.evaluations) == 64
    front = result.pareto.rows
    assert front == pareto([tuple(row) for row in front])
    quantised = qdit.quantize(spread, dataclasses.replace(config, group_size=result.config_sizes), inputs)
    assert qdit.noise_error(spread, quantised, inputs) < 1.2 * uniform["fitness"]


def test_an_interrupted_search_goes_on(spread, inputs, tmp_path):
    fitness = noise_fitness(spread, inputs)
    calls = 0

    def dying(candidate):
        nonlocal calls
        calls += 1
        if calls > 13:
            raise KeyboardInterrupt
        return fitness(candidate)

    log = tmp_path / "search.jsonl"
    with pytest.raises(KeyboardInterrupt):
        search_group_sizes(spread, CONFIG, dying, limit=12, storage=log, **SMALL)
    resumed = search_group_sizes(spread, CONFIG, fitness, limit=12, storage=log, **SMALL)
    assert resumed == search_group_sizes(spread, CONFIG, fitness, limit=12, **SMALL)
    with pytest.raises(InputError, match="search setting limits"):
        search_group_sizes(spread, CONFIG, fitness, limit=6, storage=log, **SMALL)


def test_sizes_above_a_layer_mean_whole_rows(model, inputs):
    result = search_group_sizes(model, CONFIG, noise_fitness(model, inputs), limit=40, **(SMALL | {"menu": (12, 40)}))
    assert set(result.best.values()) <= {12, 24, 40}


def test_the_frechet_fitness_uses_the_same_noise_every_time(model):
    from qdit.evaluate import reference_images

    fitness = frechet_fitness(
        reference_images("digits"), "pixels", torch.arange(20) % 10, steps=2, guidance=None, seed=0
    )
    assert fitness(model) == fitness(model) > 0


def test_fronts():
    assert pareto([(1.0, 5.0), (2.0, 4.0), (3.0, 4.5), (0.5, 6.0), (2.0, 4.0)]) == [(2.0, 4.0), (1.0, 5.0), (0.5, 6.0)]
    assert sizes_picture({"transformer_blocks.0.a": 8, "transformer_blocks.1.b.c": 64, "x": 3}).png.startswith(
        b"\x89PNG"
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"menu": ()}, ("menu",)),
        ({"menu": (0, 4)}, ("menu", "[0, 4]")),
        ({"limit": 0}, ("limit", "found 0")),
        ({"limit": {"speed": 1}}, ("limit", "speed", "bits_per_weight")),
        ({"limit": {"bits_per_weight": float("nan")}}, ("limit bits_per_weight", "nan")),
        ({"limit": {"bits_per_weight": 4.1}}, ("limit bits_per_weight", "4.1", "at least 4.")),
        ({"limit": {"rescales_per_token": 10}}, ("limit rescales_per_token", "at least 5")),
    ],
)
def test_bad_limits_are_named(model, inputs, changes, words):
    options = {"limit": 12, **SMALL, **changes}
    with pytest.raises(InputError) as caught:
        search_group_sizes(model, CONFIG, noise_fitness(model, inputs), **options)
    for word in words:
        assert word in str(caught.value)


def test_gptq_and_static_ranges_have_their_conditions(model, inputs):
    with pytest.raises(InputError, match="calibration"):
        search_group_sizes(model, QDiTConfig(4, 8), noise_fitness(model, inputs), limit=12, **SMALL)
    static = QDiTConfig(4, 8, act="static", gptq=False)
    with pytest.raises(InputError, match="field act"):
        search_group_sizes(model, static, noise_fitness(model, inputs), limit=12, calibration=inputs, **SMALL)


def test_the_command(model, tmp_path, capsys):
    qdit.save_pretrained(model, tmp_path / "model")

    def command(*arguments: object) -> int:
        sys.argv = ["qdit", *map(str, arguments)]
        return main()

    qdit.collect_calibration(model, samples=16, steps=3, guidance=None, null_fraction=0.5, seed=0).save(tmp_path / "c")
    search = ("search", tmp_path / "model", "--out", tmp_path / "s", "--menu", 6, 12, 24, "--population", 4)
    search += ("--iterations", 2, "--calibration", tmp_path / "c", "--held-out", tmp_path / "c", "--device", "cpu")
    assert command(*search, "--limit", "uniform=12", "--json") == 0
    assert json.loads(capsys.readouterr().out)["evaluations"] == 8
    assert (tmp_path / "s" / "report.html").exists()
    plan = ("--group-sizes", tmp_path / "s" / "plan.json")
    assert command("quantize", tmp_path / "model", *plan, "--no-gptq", "--out", tmp_path / "q") == 0
    stored = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]["group_sizes"]
    assert stored == json.loads((tmp_path / "s" / "plan.json").read_text())
    capsys.readouterr()
    pictures = ("--limit", "uniform=12", "--fitness", "frechet", "--rerank", "--pictures", 12, "--steps", 2)
    assert command(*search, *pictures, "--guidance", 1, "--out", tmp_path / "f", "--json") == 0
    best = json.loads(capsys.readouterr().out)["candidates"][0]
    assert best["second fitness"] == best["fitness"] > 0
    ranked = (*search, "--limit", "uniform=12", "--rerank", "--pictures", 12, "--steps", 2, "--features", "pixels")
    assert command(*ranked, "--out", tmp_path / "s", "--json") == 0  # the log of the first search serves again
    table = json.loads(capsys.readouterr().out)["candidates"]
    found = [row["second fitness"] for row in table if row["candidate"].startswith("searched")]
    assert found == sorted(found)
    assert command(*search, *pictures) == 2
    assert "this storage holds another search" in capsys.readouterr().err
    assert command(*search, *pictures, "--pictures", 1, "--out", tmp_path / "g") == 2
    assert "--pictures" in capsys.readouterr().err
    for limit, words in (("uniform=x", "--limit"), ("speed=3", "--limit"), ("bits=4.01", "at least")):
        assert command(*search, "--limit", limit) == 2
        err = capsys.readouterr().err
        assert words in err
        assert err.count("\n") == 1
    assert parse_limit("bits=4.2,rescales=1e5") == {"bits_per_weight": 4.2, "rescales_per_token": 1e5}
