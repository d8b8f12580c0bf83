"""Bit operations and sizes against the authors' code (golden/README.md)."""

import warnings

import pytest
import timm
import torch
import torchvision
from oneshot_mpq import BitConfig, Supernet

from .conftest import golden

GOLDEN, _ = golden("bitops")
MODELS = {
    "resnet18": lambda: torchvision.models.resnet18(weights=None),
    "mobilenetv2": lambda: torchvision.models.mobilenet_v2(weights=None),
    "efficientnet_lite0": lambda: timm.create_model("efficientnet_lite0", pretrained=False),
}


@pytest.mark.parametrize("name", MODELS)
def test_totals_and_layers(name):
    given = GOLDEN[name]
    model = MODELS[name]().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = Supernet(model, torch.randn(1, 3, 224, 224), fixed=None)
    assert len(net.layers) == given["n_searchable"]
    order = [layer for layer in given["layers"] if layer["fixed"] is None]
    searchable = list(net.layers.values())
    assert [net.macs[layer.name] for layer in searchable] == [layer["macs"] for layer in order]
    assert [layer.weight.numel() for layer in searchable] == [layer["params"] for layer in order]
    assert [layer.act_quantizer.signed for layer in searchable] == [layer["act_signed"] for layer in order]
    for config in given["configs"]:
        weight_bits, act_bits = config["weight_bits"], config["act_bits"]
        bits = [
            (w, a) if w in layer.weight_choices and a in layer.act_choices else None
            for layer, w, a in zip(searchable, weight_bits, act_bits, strict=True)
        ]
        if None in bits:
            continue  # uniform 8 bits, or 2 bits on depthwise layers: arithmetic of the table only
        found = BitConfig.of(net, *map(list, zip(*bits, strict=True)))
        assert found.bitops_G == pytest.approx(config["bitops_G"], rel=1e-9)
        assert found.size_MiB == pytest.approx(config["size_MiB"], rel=1e-9)
        cost = net.cost(found)
        assert sum(layer.bitops_G for layer in cost.per_layer) == pytest.approx(cost.bitops_G)
        assert sum(layer.size_MiB for layer in cost.per_layer) == pytest.approx(cost.size_MiB)
