"""Networks by name: a tiny one for handwritten digits, CIFAR's ResNets, and every model of timm."""

import torch
from jaxtyping import Float
from papercore.data.cifar_resnet import CifarResNet
from papercore.errors import InputError
from torch import Tensor, nn

CIFAR = {f"cifar-resnet{depth}": depth for depth in (8, 20, 32, 44, 56, 110)}


class DigitsNet(nn.Module):
    """Seven 3 x 3 convolutions of 8, 16 and 32 channels, each with batch norm and ReLU, and a linear classifier."""

    def __init__(self, classes: int = 10, channels: int = 1) -> None:
        super().__init__()
        widths, strides = (8, 8, 16, 16, 32, 32, 32), (1, 1, 2, 1, 2, 1, 1)
        blocks, before = [], channels
        for width, stride in zip(widths, strides, strict=True):
            conv = nn.Conv2d(before, width, 3, stride, 1, bias=False)
            blocks.append(nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU()))
            before = width
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(before, classes)

    def forward(self, x: Float[Tensor, "n channels 8 8"]) -> Float[Tensor, "n classes"]:
        return self.fc(self.blocks(x).mean((2, 3)))


def build_model(name: str, classes: int = 10, channels: int = 3) -> nn.Module:
    """An untrained model.

    Args:
        name: "digits", "cifar-resnet20" (8, 32, 44, 56, 110), or a model of timm.

    Raises:
        InputError: no such name.
    """
    if name == "digits":
        return DigitsNet(classes, channels)
    if name in CIFAR:
        return CifarResNet(CIFAR[name], classes)
    import timm

    if not timm.is_model(name):
        close = timm.list_models(f"*{name}*")[:5]
        known = f"digits, {', '.join(CIFAR)} or a model of timm"
        raise InputError("model", found=name, expected=known, hint=", ".join(close) or None)
    return timm.create_model(name, pretrained=False, num_classes=classes, in_chans=channels)


def seeded_model(name: str, classes: int, channels: int, seed: int) -> nn.Module:
    """The same untrained weights for the same seed; torch's global generator stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_model(name, classes, channels)
