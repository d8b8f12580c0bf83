"""Residual networks for CIFAR: basic blocks in three stages (He et al., arXiv 1512.03385, section 4.2, shortcuts of
option B), and ResNet-50 with a 3 x 3 stem. The "x4" ones are four times as wide, with a stem of 32 channels."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from papercore.errors import InputError
from torch import Tensor, nn


class Basic(nn.Module):
    """Two 3 x 3 convolutions and a shortcut."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(before, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.shortcut = shortcut(before, width, stride)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + self.shortcut(x))


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3, 1 x 1 convolutions to four times the width, and a shortcut."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        out = 4 * width
        self.conv1, self.bn1 = nn.Conv2d(before, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, out, 1, bias=False), nn.BatchNorm2d(out)
        self.shortcut = shortcut(before, out, stride)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(torch.relu(self.bn2(self.conv2(y)))))
        return self.relu(y + self.shortcut(x))


def shortcut(before: int, after: int, stride: int) -> nn.Module:
    """The identity, or a 1 x 1 convolution with batch norm where sizes change."""
    if stride == 1 and before == after:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))


class ResNet(nn.Module):
    """A stem and stages; every stage but the first halves the size.

    Args:
        block: Basic or Bottleneck.
        blocks: of every stage.
        widths: of every stage.
        stem: channels of the first convolution.
    """

    def __init__(
        self,
        block: type[Basic] | type[Bottleneck],
        blocks: Sequence[int],
        widths: Sequence[int],
        stem: int,
        classes: int = 100,
    ) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu = nn.Conv2d(3, stem, 3, padding=1, bias=False), nn.BatchNorm2d(stem), nn.ReLU()
        before, expansion = stem, 4 if block is Bottleneck else 1
        self.stages = len(blocks)
        for stage, (count, width) in enumerate(zip(blocks, widths, strict=True), start=1):
            layers = []
            for i in range(count):
                layers.append(block(before, width, 2 if i == 0 and stage > 1 else 1))
                before = expansion * width
            setattr(self, f"layer{stage}", nn.Sequential(*layers))
        self.fc = nn.Linear(before, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, "batch classes"]:
        x = self.relu(self.bn1(self.conv1(x)))
        for stage in range(1, self.stages + 1):
            x = getattr(self, f"layer{stage}")(x)
        return self.fc(x.mean((2, 3)))


def cifar_resnet(depth: int, classes: int = 100, *, wide: bool = False) -> ResNet:
    """6n + 2 layers; `wide`: the "x4" variant.

    Raises:
        InputError: another depth.
    """
    if depth < 8 or depth % 6 != 2:
        raise InputError("depth", found=depth, expected="6n + 2")
    widths, stem = ((64, 128, 256), 32) if wide else ((16, 32, 64), 16)
    return ResNet(Basic, [depth // 6] * 3, widths, stem, classes)


def resnet50(classes: int = 100) -> ResNet:
    """Four stages of bottlenecks, the first at full size."""
    return ResNet(Bottleneck, (3, 4, 6, 3), (64, 128, 256, 512), 64, classes)
