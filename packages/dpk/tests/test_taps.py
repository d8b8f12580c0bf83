"""Taps by name and automatically, on networks of three sources."""

import pytest
import timm
import torch
import torchvision
from dpk.method import Pair
from dpk.taps import Taps, auto_pairs, stages
from papercore.errors import InputError
from torch import nn
from torch.nn import functional


@pytest.fixture(scope="module")
def image() -> torch.Tensor:
    return torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", ["relu", "layer1", "layer2", "layer3", "layer4"]),
        ("mobilenet_v2", ["features.1", "features.3", "features.6", "features.13", "features"]),
        ("shufflenet_v2_x0_5", ["conv1", "maxpool", "stage2", "stage3", "conv5"]),
        ("regnet_y_400mf", ["stem", *(f"trunk_output.block{k}" for k in (1, 2, 3)), "trunk_output"]),
        ("swin_t", ["features.1", "features.3", "features.5", "permute"]),
    ],
)
def test_stages_of_torchvision_networks(name, expected, image):
    network = torchvision.models.get_model(name).to("meta")
    assert list(stages(network, image.to("meta")).values()) == expected


def test_stages_of_timm_networks_and_their_pairs(image):
    resnet, mobile = timm.create_model("resnet26"), timm.create_model("mobilenetv3_small_050")
    assert list(stages(resnet, image).values()) == ["act1", "layer1", "layer2", "layer3", "layer4"]
    pairs = auto_pairs(mobile, resnet, image, 2)
    assert pairs == [Pair("blocks.3", "layer3"), Pair("blocks", "layer4")]
    assert len(auto_pairs(mobile, resnet, image, "all")) == 5
    with pytest.raises(InputError, match="no stages of equal stride"):
        auto_pairs(nn.Sequential(nn.Conv2d(3, 3, 3, 4, 1)), nn.Sequential(nn.Conv2d(3, 3, 3, 8, 1)), image)


def test_tokens_become_maps_without_their_prefix():
    network = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2)
    image = torch.randn(2, 3, 64, 64)
    taps = Taps(network, ["blocks.0", "blocks"], image)
    assert [(info.channels, info.height, info.width) for info in taps.infos] == [(192, 4, 4)] * 2
    seen = []
    handle = network.blocks[0].register_forward_hook(lambda module, args, output: seen.append(output))
    with taps.capture() as (maps, pooled):
        network(image)
    handle.remove()
    torch.testing.assert_close(maps[0].flatten(2).mT, seen[0][:, 1:])
    assert pooled[0].shape == (2, 192)
    (pair,) = auto_pairs(network, network, image)
    assert pair.student == "norm"


def test_tokens_that_are_no_square_need_a_grid():
    network = timm.create_model("vit_tiny_patch16_224", img_size=(64, 32), depth=1)
    image = torch.randn(1, 3, 64, 32)
    with pytest.raises(InputError, match=r"output of blocks: found shape \(1, 9, 192\)"):
        Taps(network, ["blocks"], image)
    (info,) = Taps(network, ["blocks"], image, grids=[(4, 2)]).infos
    assert (info.height, info.width) == (4, 2)
    with pytest.raises(InputError, match="of at most 9"):
        Taps(network, ["blocks"], image, grids=[(4, 3)])


def test_channels_last_maps_are_turned():
    network = timm.create_model("swin_tiny_patch4_window7_224", img_size=56, window_size=7, depths=(1, 1, 1, 1))
    taps = Taps(network, ["layers.1"], torch.randn(1, 3, 56, 56))
    assert taps.infos[0].channels == 192
    with taps.capture() as (maps, _):
        network(torch.randn(1, 3, 56, 56))
    assert maps[0].shape == (1, 192, 7, 7)


class Functional(nn.Module):
    """Ends in a function; the activation before it works in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        x = functional.relu(self.first(x), inplace=True)
        return torch.relu_(self.second(x) + x)


@pytest.mark.parametrize("block", [Functional(), nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True))])
def test_preactivation_is_what_the_last_activation_was_given(block):
    network = nn.Sequential(block, nn.Flatten(), nn.LazyLinear(3))
    x = torch.randn(2, 1, 8, 8)
    network(x)
    before, after = (Taps(network, ["0"], x, preactivation=wanted) for wanted in (True, False))
    with before.capture() as (raw, _), after.capture() as (active, _):
        network(x).sum().backward()
    assert bool((raw[0] < 0).any())
    torch.testing.assert_close(torch.relu(raw[0]), active[0])
    assert raw[0].requires_grad


def test_a_stage_without_an_activation_at_its_end_gives_its_output():
    network = torchvision.models.mobilenet_v2()
    image = torch.randn(1, 3, 32, 32)
    network.eval()
    taps = [Taps(network, ["features.3"], image, preactivation=wanted) for wanted in (True, False)]
    with taps[0].capture() as (a, _), taps[1].capture() as (b, _):
        network(image)
    assert torch.equal(a[0], b[0])


def test_residual_networks_give_the_sum_before_their_last_relu():
    network = torchvision.models.resnet18().eval()
    image = torch.randn(1, 3, 32, 32)
    taps = Taps(network, ["layer2"], image)
    with taps.capture() as (maps, _):
        network(image)
    block = network.layer2[1]
    x = network.layer1(network.maxpool(network.relu(network.bn1(network.conv1(image)))))
    x = network.layer2[0](x)
    expected = block.bn2(block.conv2(torch.relu(block.bn1(block.conv1(x))))) + x
    torch.testing.assert_close(maps[0], expected)


def test_nothing_stays_in_the_network(net, batch):
    network = net().train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    taps = Taps(network, ["stage1", "stage2"], batch[0])
    assert network.training
    with pytest.raises(RuntimeError, match="stop"), taps.capture():
        raise RuntimeError("stop")
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in network.modules())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert (taps.classes, taps.pooled, taps.classifier) == (10, 12, "head")


def test_unknown_taps_are_answered_with_names(net, batch):
    with pytest.raises(InputError, match=r"'stage3' in the student: expected perhaps stage\d, .*depth: stem, stage1"):
        Taps(net(), ["stage3"], batch[0], role="student")
    network = net()
    network.spare = nn.Conv2d(1, 1, 1)
    with pytest.raises(InputError, match=r"tap spare: found.*not called"):
        Taps(network, ["spare"], batch[0])
    with pytest.raises(InputError, match=r"output of head: found shape \(16, 10\)"):
        Taps(network, ["head"], batch[0])
