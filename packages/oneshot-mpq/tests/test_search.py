"""Searches on the real network, and on errors that are known."""

import itertools

import numpy as np
import pytest
import torch
from oneshot_mpq import BitConfig, freeze, recalibrate, search
from oneshot_mpq.search import METHODS, search_front
from oneshot_mpq.search.problem import Images, Problem
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


@pytest.fixture
def loader(images):
    return DataLoader(TensorDataset(images, torch.arange(16) % 10), 8)


@pytest.mark.parametrize("method", [m for m in METHODS if m in ("greedy", "ilp")])
@pytest.mark.parametrize("unit", ["bitops_G", "size_MiB"])
def test_the_budget_is_kept_and_the_network_set(net, loader, method, unit):
    uniform = BitConfig.uniform(net, 4, 4)
    result = search(net, loader, {unit: getattr(uniform, unit)}, method)
    assert getattr(result.config, unit) <= getattr(uniform, unit) * (1 + 1e-9)
    assert net.config().weight_bits == result.config.weight_bits
    assert result.evaluations == len(result.log.rows)
    again = search(net, loader, {unit: getattr(uniform, unit)}, method)
    assert again.config == result.config


def additive(monkeypatch, seed=0):
    """The loss of a configuration becomes a sum over layers of stored numbers that fall with the bits."""
    generator = np.random.default_rng(seed)
    scale = generator.uniform(0.1, 3, 6)

    def measure(self, bits):
        value = sum(s * 2.0 ** (-1.5 * b) for s, b in zip(scale, bits, strict=True))
        self.measured[bits] = (value, 0.0)
        return value, 0.0

    monkeypatch.setattr(Problem, "measure", measure)


@pytest.mark.parametrize("seed", range(2))
def test_the_integer_programme_finds_the_exact_optimum(net, loader, monkeypatch, seed):
    additive(monkeypatch, seed)
    budget = {"bitops_G": BitConfig.uniform(net, 4, 4).bitops_G}
    found = search(net, loader, budget, "ilp")
    problem = Problem(net, Images(net, loader), budget, "loss")
    everything = [b for b in itertools.product(*problem.choices) if problem.fits(b)]
    best = min(everything, key=problem.measure)
    values = {m: search(net, loader, budget, m, evaluations=150).config.metrics["search_loss"] for m in METHODS}
    assert found.config.metrics["search_loss"] == pytest.approx(problem.measure(best)[0])
    assert all(value >= problem.measure(best)[0] - 1e-12 for value in values.values())
    assert values["greedy"] <= 1.3 * values["ilp"] and values["evolution"] <= values["random"] * 1.1


def test_frozen_bits_are_used_unless_they_shall_be_respected(net, loader, monkeypatch):
    additive(monkeypatch)
    net.layers["a"].allow((3, 4, 5, 6))
    cheapest = {"size_MiB": 0.95 * BitConfig.of(net, [3, 3, 2], [6, 6, 6]).size_MiB}
    assert search(net, loader, cheapest, "ilp").config.weight_bits[0] == 2
    with pytest.raises(ValueError, match="budget size_MiB"):
        search(net, loader, cheapest, "ilp", respect_frozen=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": {"bitops_G": 0.0}}, r"budget bitops_G: found 0\.0, expected 0\.\d+ to 0\.\d+"),
        ({"budget": {"seconds": 1.0}}, "budget"),
        ({"budget": {}}, "budget"),
        ({"budget": {"bitops_G": 1000.0}}, r"found 1000\.0, expected 0\.\d+ to 0\.\d+"),
        ({"budget": {"latency_ms": 1.0}}, "no latency table"),
        ({"storage": "file", "budget": {"bitops_G": 0.01}}, "storage"),
        ({"compat": "other"}, "compat"),
        ({"compat": "reference", "method": "ilp"}, "compat"),
        ({"evaluations": 0}, "evaluations"),
        ({"method": "guess"}, "method"),
        ({"objective": "speed"}, "objective"),
        ({"calib_loader": []}, "calib_loader"),
    ],
)
def test_wrong_questions_are_named(net, loader, options, message):
    with pytest.raises(ValueError, match=message):
        search(net, **{"calib_loader": loader, "budget": {"bitops_G": 1.0}, **options})


def test_recalibration_gives_the_means_over_the_images(net, images):
    loader = DataLoader(TensorDataset(images, torch.zeros(16)), 4)
    net.select([3, 3, 4], [4, 4, 5])
    seen = []
    bank = net.layers["a"].batchnorm
    handle = bank.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    other = bank.running_mean[0].clone()
    assert recalibrate(net.eval(), loader, images=12) == 12
    handle.remove()
    assert not net.training and isinstance(net.model.bn1, nn.BatchNorm2d)
    means = torch.stack([x.mean((0, 2, 3)) for x in seen]).mean(0)
    torch.testing.assert_close(bank.running_mean[bank.selected], means)
    assert torch.equal(bank.running_mean[0], other) and bank.momentum == 0.1
    with pytest.raises(ValueError, match="recalibration images"):
        recalibrate(net, [])


def test_a_frozen_network_gives_what_the_supernet_gives(net, images):
    net.eval()
    for weight_bits, act_bits in (([3, 4, 2], [5, 3, 2]), ([6, 6, 6], [6, 6, 6])):
        net.set_bits(BitConfig.of(net, weight_bits, act_bits))
        recalibrate(net, DataLoader(TensorDataset(images, torch.zeros(16)), 8))
        with torch.no_grad():
            frozen, expected = freeze(net), net(images)
            assert torch.equal(frozen(images), expected)
        assert not any(p.requires_grad for p in frozen.parameters())
        values = frozen.a[1].weight.unique()
        assert len(values) <= 2 ** weight_bits[0]
        assert type(frozen.abn) is nn.BatchNorm2d and type(frozen.a[1]) is nn.Conv2d


def test_a_front_is_measured_not_extrapolated(net, loader):
    budgets = [{"size_MiB": BitConfig.uniform(net, b, b).size_MiB} for b in (5, 4, 3)]
    front = search_front(net, loader, budgets)
    assert [r.config.size_MiB <= b["size_MiB"] for r, b in zip(front.results, budgets, strict=True)] == [True] * 3
    costs, losses = [row[1] for row in front.table.rows], [row[2] for row in front.table.rows]
    assert costs == sorted(costs) and losses == sorted(losses, reverse=True) and len(set(losses)) == len(losses)
    assert {row[0] for row in front.table.rows} <= {row[0] for row in front.results[-1].log.rows}
    last = search(net, loader, budgets[-1])
    assert last.config.weight_bits == front.results[-1].config.weight_bits
    assert front.results[-1].evaluations > last.evaluations  # of all three together
    with pytest.raises(ValueError, match="one unit"):
        search_front(net, loader, [*budgets, {"bitops_G": 1.0}])


def test_evolution_goes_on_from_its_storage(net, loader, monkeypatch, tmp_path):
    additive(monkeypatch)
    budget = {"bitops_G": BitConfig.uniform(net, 4, 4).bitops_G}
    whole = search(net, loader, budget, "evolution", evaluations=60)
    search(net, loader, budget, "evolution", evaluations=30, storage=tmp_path / "log")
    counted = []
    measure = Problem.measure
    monkeypatch.setattr(Problem, "measure", lambda self, bits: counted.append(bits) or measure(self, bits))
    rest = search(net, loader, budget, "evolution", evaluations=60, storage=tmp_path / "log")
    assert rest.config == whole.config
    with torch.no_grad():
        net.layers["a"].weight.add_(1)
    with pytest.raises(ValueError, match="weights"):
        search(net, loader, budget, "evolution", evaluations=60, storage=tmp_path / "log")


@pytest.mark.parametrize("method", ["greedy", "ilp", "evolution", "random"])
def test_a_latency_table_that_does_not_fall_with_the_bits(net, loader, method):
    generator = np.random.default_rng(0)
    table = {
        name: {(w, a): float(generator.uniform(1, 2)) for w in layer.weight_choices for a in layer.act_choices}
        for name, layer in net.layers.items()
    }
    least = sum(min(pairs.values()) for pairs in table.values())
    found = search(net, loader, {"latency_ms": 1.05 * least}, method, latency=table, evaluations=60)
    pairs = zip(net.layers, found.config.weight_bits, found.config.act_bits, strict=True)
    spent = sum(table[name][w, a] for name, w, a in pairs)
    assert spent <= 1.05 * least and found.config.metrics["latency_ms"] == pytest.approx(spent)
    del table["a"][3, 3]
    with pytest.raises(ValueError, match="latency of a: found nothing for W3A3"):
        search(net, loader, {"latency_ms": 1.05 * least}, method, latency=table)


def test_test_images_are_refused(net, loader, images):
    budget = {"size_MiB": BitConfig.uniform(net, 4, 4).size_MiB}
    test = DataLoader(TensorDataset(images[10:12], torch.zeros(2)), 2)
    with pytest.raises(ValueError, match="2 images of the test data"):
        search(net, loader, budget, test_loader=test)
    other = DataLoader(TensorDataset(images[10:12] + 1, torch.zeros(2)), 2)
    assert search(net, loader, budget, "random", evaluations=3, test_loader=other).config.size_MiB <= budget["size_MiB"]


def test_labels_beyond_the_classifier_are_named(net, images):
    loader = DataLoader(TensorDataset(images, torch.arange(16)), 8)
    with pytest.raises(ValueError, match="found 8 to 15, expected 0 to 9"):
        search(net, loader, {"size_MiB": BitConfig.uniform(net, 4, 4).size_MiB})


def test_the_originals_search_runs_on_a_network_it_has_constants_for(net, loader):
    net.name = "mobilenetv2-like"
    budget = {"bitops_G": BitConfig.uniform(net, 4, 4).bitops_G}
    found = search(net, loader, budget, compat="reference")
    assert found.config.bitops_G < budget["bitops_G"]
    net.name = "other"
    with pytest.raises(ValueError, match="constants"):
        search(net, loader, budget, compat="reference")
