"""The networks of the CIFAR-100 protocol: as many parameters as the known ones, stages at the known sizes."""

import pytest
import torch
from dpk.networks import create_model
from papercore.errors import InputError

PARAMETERS = {
    "resnet8": 83_892,
    "resnet20": 278_324,
    "resnet32": 472_756,
    "resnet44": 667_188,
    "resnet56": 861_620,
    "resnet110": 1_736_564,
    "resnet8x4": 1_233_540,
    "resnet32x4": 7_433_860,
    "resnet50": 23_705_252,
    "wrn_16_2": 703_284,
    "wrn_40_1": 569_780,
    "wrn_40_2": 2_255_156,
    "vgg8": 3_965_028,
    "vgg13": 9_462_180,
    "mobilenetv2": 812_836,
    "shufflenetv1": 949_258,
    "shufflenetv2": 1_355_528,
}
"""at 100 classes, as the authors of the protocol count them"""
SIZES = {
    "resnet20": ("layer", (32, 16, 8)),
    "resnet50": ("layer", (32, 16, 8, 4)),
    "wrn_16_2": ("block", (32, 16, 8)),
    "vgg8": ("block", (32, 16, 8, 4, 4)),
    "shufflenetv1": ("layer", (16, 8, 4)),
    "shufflenetv2": ("layer", (16, 8, 4)),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_as_many_as_the_known_ones(name):
    with torch.device("meta"):
        model = create_model(name)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", SIZES)
def test_stages_have_the_known_sizes(name):
    prefix, sizes = SIZES[name]
    model, found = create_model(name, 7).eval(), []
    first = 1 if prefix == "layer" or name.startswith("wrn") else 0
    for stage in range(first, first + len(sizes)):
        getattr(model, f"{prefix}{stage}").register_forward_hook(lambda m, i, o: found.append(o.shape[-1]))
    with torch.no_grad():
        assert model(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    assert tuple(found) == sizes


def test_mobilenet_and_the_others_by_name():
    with torch.no_grad():
        assert create_model("mobilenetv2").eval()(torch.randn(1, 3, 32, 32)).shape == (1, 100)
        assert create_model("cifar10_resnet20", 10).eval()(torch.randn(1, 3, 32, 32)).shape == (1, 10)
        assert create_model("timm:resnet10t", 5).eval()(torch.randn(1, 3, 32, 32)).shape == (1, 5)


@pytest.mark.parametrize("name", ["resnet21", "vgg12", "wrn_12_1", "wrn_16_0", "net", "timm:net", "resnet20x"])
def test_names_that_are_no_network(name):
    with pytest.raises(InputError):
        create_model(name)
    with pytest.raises(InputError, match="classes"):
        create_model("resnet20", 0)
