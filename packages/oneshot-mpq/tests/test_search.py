"""Searches on the real network, and on errors that are known."""

import itertools

import numpy as np
import pytest
import torch
from oneshot_mpq import BitConfig, freeze, recalibrate, search
from oneshot_mpq.search import METHODS
from oneshot_mpq.search.problem import Problem
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


@pytest.mark.parametrize("seed", range(3))
def test_the_integer_programme_finds_the_exact_optimum(net, loader, monkeypatch, seed):
    additive(monkeypatch, seed)
    budget = {"bitops_G": BitConfig.uniform(net, 4, 4).bitops_G}
    found = search(net, loader, budget, "ilp")
    problem = Problem(net, loader, budget, "loss", False)
    everything = [b for b in itertools.product(*problem.choices) if problem.fits(b)]
    best = min(everything, key=problem.measure)
    values = {m: search(net, loader, budget, m).config.metrics["search_loss"] for m in METHODS}
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
