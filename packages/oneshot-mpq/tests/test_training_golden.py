"""Steps at the start, turbulence, schedules and whole training steps, against the authors' code (golden/README.md)."""

from itertools import pairwise

import pytest
import torch
from oneshot_mpq import LSQ, FreezeScheduler, Supernet, TrainConfig
from oneshot_mpq.layers import QuantLayer
from oneshot_mpq.sandwich import Sandwich
from oneshot_mpq.schedule import Dampening
from oneshot_mpq.turbulence import unstable
from torch import nn

from .conftest import Small, golden

INIT, INIT_ARRAYS = golden("step_init")
TURBULENCE, TURBULENCE_ARRAYS = golden("turbulence_a")
SCHEDULES, _ = golden("schedules")
FULL = (2, 3, 4, 5, 6)


@pytest.mark.parametrize("case", INIT, ids=lambda c: str(c["index"]))
def test_steps_at_the_start(case):
    weight = torch.from_numpy(INIT_ARRAYS[f"w{case['index']}"]).double()
    activation = torch.from_numpy(INIT_ARRAYS[f"a{case['index']}"]).double()
    weights, activations = (LSQ(FULL, signed, dtype=torch.float64) for signed in (True, False))
    weights.initialise_weight(weight)
    activations.initialise_activation(activation)
    for bits in FULL:
        assert weights.step(bits).item() == pytest.approx(case["weight_step"][str(bits)], rel=1e-6)
        assert activations.step(bits).item() == pytest.approx(case["act_unsigned_step"][str(bits)], rel=1e-6)


class Layers(nn.Module):
    """One layer for every weight of the turbulence case, between two that are fixed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 1), nn.Linear(4, 2)
        for layer in TURBULENCE["layers"]:
            out, inner, *kernel = layer["weight_shape"]
            groups = out if layer["depthwise"] else 1
            conv = nn.Conv2d(inner * groups, out, kernel, groups=groups, bias=False)
            setattr(self, f"w{layer['index']}", nn.Sequential(conv, nn.BatchNorm2d(out)))

    def forward(self, x):
        y = self.first(x)
        for layer in TURBULENCE["layers"]:
            module = getattr(self, f"w{layer['index']}")
            module(torch.zeros(1, module[0].in_channels, 6, 6))
        return self.last(y.mean((2, 3)))


@pytest.fixture(scope="module")
def layers() -> Supernet:
    net = Supernet(Layers(), torch.zeros(1, 3, 6, 6))
    for layer, given in zip(net.layers.values(), TURBULENCE["layers"], strict=True):
        layer.weight.data = torch.from_numpy(TURBULENCE_ARRAYS[f"w{given['index']}"]).double()
        steps = [given["steps"][str(bits)] for bits in layer.weight_choices]
        layer.weight_quantizer.steps.data = torch.tensor(steps, dtype=torch.float64)
    return net


def test_unstable_weights(layers):
    for layer, given in zip(layers.layers.values(), TURBULENCE["layers"], strict=True):
        assert layer.depthwise == given["depthwise"]
        for bits in layer.weight_choices:
            step = layer.weight_quantizer.step(bits)
            assert int(unstable(layer.weight, step, bits)) == given["unstable_count"][str(bits)]


def test_freezing_and_thawing(layers):
    for event in TURBULENCE["events"]:
        for layer, allowed in zip(layers.layers.values(), event["candidates_before"], strict=True):
            layer.allow(allowed)
        found = FreezeScheduler.freeze(layers, event["ratio"])
        assert list(found.values()) == pytest.approx(event["turbulence"], abs=1e-9)
        after = [list(layer.allowed_weight_bits)[::-1] for layer in layers.layers.values()]
        assert after == event["candidates_after"]


@pytest.mark.parametrize("run", SCHEDULES["runs"], ids=lambda r: str(r["epochs"]))
def test_schedules(run):
    events = FreezeScheduler(run["epochs"]).events()
    assert [epoch for epoch, _ in events] == [event["epoch"] for event in run["freeze_events"]]
    assert [ratio for _, ratio in events] == pytest.approx([e["ratio"] for e in run["freeze_events"]], abs=1e-12)
    dampening = Dampening(run["epochs"], run["steps_per_epoch"])
    for point in run["dampening"]:
        assert dampening.weight(point["step"]) == pytest.approx(point["weight"], abs=1e-12)


def build(notes, arrays) -> tuple[Supernet, torch.Tensor, torch.Tensor]:
    """The golden network in float64 with the stored weights and steps."""
    model = Small().double()
    for name in ("conv1", "a", "d", "p", "fc"):
        getattr(model, name).weight.data = torch.from_numpy(arrays[f"{name}.weight"])
    model.fc.bias.data = torch.from_numpy(arrays["fc.bias"])
    for name in ("bn1", "abn", "dbn", "pbn"):
        getattr(model, name).weight.data = torch.from_numpy(arrays[f"{name}.gamma"])
        getattr(model, name).bias.data = torch.from_numpy(arrays[f"{name}.beta"])
    x, y = torch.from_numpy(arrays["x"]), torch.from_numpy(arrays["y"])
    net = Supernet(model, x, FULL, fixed={"conv1": (8, None), "fc": (8, 8)}, act_sign="unsigned")
    net.calibrate(x)
    for name, given in notes["layers"].items():
        layer = net.layers[name] if name in net.layers else net.fixed[name]
        assert isinstance(layer, QuantLayer)
        for quantizer, steps in (
            (layer.weight_quantizer, given["weight_steps"]),
            (layer.act_quantizer, given["act_steps"]),
        ):
            if quantizer is not None:
                quantizer.steps.data = torch.tensor([steps[str(b)] for b in quantizer.bits], dtype=torch.float64)
        if "candidates_now" in given:
            layer.allow(given["candidates_now"])
    return net.train(), x, y


@pytest.mark.parametrize("name", ["step_a", "step_b"])
def test_a_whole_training_step(name):
    notes, arrays = golden(name)
    net, x, y = build(notes, arrays)
    assert list(net.layers) == notes["order"]
    config = TrainConfig(paths=len(notes["paths"]), idm=notes["idm_weight"], weight_decay=notes["weight_decay"])
    method = Sandwich(net, config, 100)
    method.begin_step(net, 0)
    method.paths = [
        method.paths[0]._replace(weight_bits=tuple(p["weight_bits"]), act_bits=tuple(p["act_bits"]))
        for p in notes["paths"]
    ]
    method.dampening_weight = notes["qe_weight"]
    logits = []
    handle = net.register_forward_hook(lambda module, inputs, output: logits.append(output.detach()))
    outputs = {}

    def keep(name):
        def hook(module, inputs, output):
            outputs.setdefault(name, output.detach())  # the first pass is the largest path

        return hook

    banks = [layer.batchnorm.register_forward_hook(keep(name)) for name, layer in net.layers.items()]
    for loss in method.losses(net, (x, y), torch.Generator()):
        loss.backward()
    for hook in (handle, *banks):
        hook.remove()

    def close(found, expected):
        torch.testing.assert_close(found, torch.as_tensor(expected, dtype=torch.float64), rtol=0, atol=1e-9)

    close(logits[0], arrays["max.logits"])
    for layer, output in outputs.items():
        close(output, arrays[f"max.bn_out.{layer}"])
    close(method.terms[0]["total"], notes["max"]["loss"] + notes["max"]["region_decay_term"])
    for index, (terms, expected) in enumerate(zip(method.terms[1:], notes["paths"], strict=True)):
        close(logits[1 + index], arrays[f"path{index}.logits"])
        for term in ("ce", "kl", "idm", "total"):
            close(terms.get(term, torch.zeros((), dtype=torch.float64)), expected[term])
        close(terms["dampening"] * notes["qe_weight"], expected["dampening_times_weight"])
        close(terms.get("region", torch.zeros((), dtype=torch.float64)), expected["region_decay_term"])
    for layer, given in notes["layers"].items():
        module = net.layers[layer] if layer in net.layers else net.fixed[layer]
        close(module.weight.grad, arrays[f"grad.{layer}.weight"])
        for kind, quantizer in (("weight", module.weight_quantizer), ("act", module.act_quantizer)):
            if quantizer is not None:
                order = [int(bits) for bits in given[f"{kind}_steps"]]
                assert all(later < earlier for earlier, later in pairwise(order))
                close(quantizer.steps.grad.flip(0), arrays[f"grad.{layer}.{kind}_steps"])
