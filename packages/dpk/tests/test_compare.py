"""Comparisons, shipped recipes, the protocol's data, and configurations of mdistiller."""

import dataclasses
import json
import math

import pytest
import torch
from dpk.compare import compare, comparison_table, mean_and_error
from dpk.convert_config import convert_config
from dpk.method import CrossEntropy, Pair
from dpk.methods import KD, FitNet
from dpk.networks import create_model
from dpk.protocol import PAIRS, method_options
from dpk.recipe import METHODS, Recipe, make_method, read_recipe
from papercore.config import build
from papercore.errors import InputError
from papercore.training import TrainConfig
from torch.utils.data import TensorDataset


def data(count: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(count)
    return TensorDataset(
        torch.randn(count, 1, 8, 8, generator=generator), torch.randint(10, (count,), generator=generator)
    )


def test_methods_share_seeds_and_finished_runs_are_loaded(net, tmp_path):
    config = TrainConfig(steps=4, batch_size=8, learning_rate=0.05, optimizer="sgd", checkpoint_every=4, log_every=2)
    pairs = [Pair("stage2", "stage2")]
    methods = {"ce": CrossEntropy, "kd": KD, "fitnet": lambda: FitNet(pairs=pairs)}

    def run():
        return compare(
            lambda seed: net(4, seed),
            net(6, 9),
            methods,
            data(16),
            data(12),
            config,
            tmp_path,
            seeds=(0, 1),
            example=torch.zeros(2, 1, 8, 8),
            device="cpu",
        )

    found = run()
    again = run()
    assert [c.method for c in found] == list(methods)
    assert [(c.last, c.best) for c in found] == [(c.last, c.best) for c in again]
    assert all(len(c.last) == 2 and max(c.seconds) < 5 for c in again)
    table = comparison_table(found)
    assert [row[0] for row in table.rows] == list(methods)
    assert "±" in table.rows[0][1]
    assert json.loads((tmp_path / "kd-seed1" / "metrics.json").read_text())["last"]["top1"] == found[1].last[1]
    rest = (data(8), data(8), config, tmp_path)
    example = torch.zeros(2, 1, 8, 8)
    with pytest.raises(InputError, match="seeds"):
        compare(lambda seed: net(4), None, methods, *rest, seeds=(1, 1), example=example)
    with pytest.raises(InputError, match="methods"):
        compare(lambda seed: net(4), None, {}, *rest, seeds=(1,), example=example)


def test_standard_errors():
    assert mean_and_error([70.0]) == "70.00"
    assert mean_and_error([70.0, 72.0]) == f"71.00 ± {math.sqrt(2) / math.sqrt(2):.2f}"


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.name)
def test_every_pair_has_a_recipe_that_builds(pair):
    recipe = read_recipe(pair.name)
    assert (recipe.teacher, recipe.student) == (pair.teacher, pair.student)
    assert recipe.solver.learning_rate == pair.learning_rate
    assert recipe.solver.milestones == (150, 180, 210)
    recipe.build_method()
    for name in METHODS:
        make_method(name, method_options(name, pair))
    with torch.device("meta"):
        create_model(pair.teacher)
        create_model(pair.student)
    assert all(math.isfinite(value) for value in pair.published.values())


CONFIG = """
EXPERIMENT: {{NAME: "", TAG: "dkd", PROJECT: "cifar100_baselines"}}
DISTILLER: {{TYPE: "{type}", TEACHER: "{teacher}", STUDENT: "ShuffleV1"}}
SOLVER: {{BATCH_SIZE: 64, EPOCHS: 240, LR: 0.01, LR_DECAY_STAGES: [150, 180, 210], WEIGHT_DECAY: 0.0005, TYPE: "SGD"}}
{rest}
"""


@pytest.mark.parametrize(
    ("kind", "rest", "method", "options"),
    [
        ("DKD", "DKD: {BETA: 6., T: 4}", "dkd", {"beta": 6.0, "temperature": 4.0, "warmup": 20}),
        ("KD", "KD: {TEMPERATURE: 2, LOSS: {CE_WEIGHT: 0.5, KD_WEIGHT: 0.5}}", "kd", {"weight": 0.5, "ce_weight": 0.5}),
        ("FITNET", "FITNET: {LOSS: {FEAT_WEIGHT: 50}}", "fitnet", {"weight": 50.0}),
        ("AT", "", "at", {"weight": 1000.0, "power": 2}),
        ("REVIEWKD", "REVIEWKD: {REVIEWKD_WEIGHT: 5.0, SHAPES: [1, 8]}", "reviewkd", {"weight": 5.0, "warmup": 20}),
        ("NONE", "", "ce", {}),
    ],
)
def test_configurations_of_mdistiller(tmp_path, kind, rest, method, options):
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG.format(type=kind, teacher="resnet32x4", rest=rest))
    found = convert_config(path)
    recipe = build(Recipe, found.recipe, path)
    assert (recipe.method, recipe.student) == (method, "shufflenetv1")
    assert recipe.teacher == (None if kind == "NONE" else "resnet32x4")
    assert options.items() <= recipe.options.items()
    assert dataclasses.asdict(recipe.solver)["learning_rate"] == 0.01
    recipe.build_method()
    assert "SOLVER.TYPE" in found.left_out
    assert ("REVIEWKD.SHAPES" in found.left_out) == (kind == "REVIEWKD")


def test_configurations_that_are_wrong(tmp_path):
    path = tmp_path / "config.yaml"
    for text, words in (
        ("a: 1", "DISTILLER"),
        (CONFIG.format(type="CRD", teacher="resnet56", rest=""), "DISTILLER.TYPE"),
        (CONFIG.format(type="KD", teacher="resnet57", rest=""), "network|depth"),
        (CONFIG.format(type="KD", teacher="resnet56", rest="DATASET: {TYPE: imagenet}"), "DATASET.TYPE"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=words):
            convert_config(path)
    with pytest.raises(InputError, match="cannot be read"):
        convert_config(tmp_path / "none.yaml")


def test_steps_are_timed_side_by_side():
    from dpk.benchmark import METHODS, benchmark_steps

    table = benchmark_steps("resnet8", "resnet8", 4, 1, device="cpu")["steps"]
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows.keys() == METHODS.keys()
    assert rows["fitnet"][1] == rows["reviewkd"][2] == 1
    assert all(row[0] > 0 for row in rows.values())
    assert rows["reviewkd"][3] > 0
    with pytest.raises(InputError, match="at least 4 and 1"):
        benchmark_steps("resnet8", "resnet8", 2, 1)
