"""Small networks for CIFAR: MobileNetV2 of half width (arXiv 1801.04381), ShuffleNet V1 with three groups
(arXiv 1707.01083) and V2 x1 (arXiv 1807.11164), the latter two without their first pooling and with a 1 x 1 stem."""

import torch
from jaxtyping import Float
from torch import Tensor, nn


def convolved(
    before: int, after: int, kernel: int = 1, stride: int = 1, groups: int = 1
) -> tuple[nn.Module, nn.Module]:
    """A convolution without bias, and its batch norm."""
    conv = nn.Conv2d(before, after, kernel, stride, kernel // 2, groups=groups, bias=False)
    return conv, nn.BatchNorm2d(after)


def shuffled(x: Float[Tensor, "batch channels h w"], groups: int) -> Float[Tensor, "batch channels h w"]:
    """The channels of all groups in turn."""
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


class InvertedResidual(nn.Module):
    """Expand, filter by channel, project; no activation at the end."""

    def __init__(self, before: int, after: int, stride: int, expansion: int) -> None:
        super().__init__()
        middle = before * expansion
        self.conv = nn.Sequential(
            *convolved(before, middle),
            nn.ReLU(),
            *convolved(middle, middle, 3, stride, middle),
            nn.ReLU(),
            *convolved(middle, after),
        )
        self.residual = stride == 1 and before == after

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNetV2(nn.Module):
    """At half width: stages at 16, 8, 4 and 2 pixels."""

    SETTINGS = (
        (1, 16, 1, 1),
        (6, 24, 2, 1),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    )
    """expansion, channels at full width, blocks, stride"""

    def __init__(self, classes: int = 100, width: float = 0.5) -> None:
        super().__init__()
        before = int(32 * width)
        self.conv1 = nn.Sequential(*convolved(3, before, 3, 2), nn.ReLU())
        stages = []
        for expansion, channels, blocks, stride in self.SETTINGS:
            layers = []
            for i in range(blocks):
                layers.append(InvertedResidual(before, int(channels * width), stride if i == 0 else 1, expansion))
                before = int(channels * width)
            stages.append(nn.Sequential(*layers))
        self.blocks = nn.ModuleList(stages)
        self.conv2 = nn.Sequential(*convolved(before, 1280), nn.ReLU())
        self.classifier = nn.Linear(1280, classes)

    def forward(self, x: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, "batch classes"]:
        x = self.conv1(x)
        for block in self.blocks:
            x = block(x)
        return self.classifier(self.conv2(x).mean((2, 3)))


class ShuffleUnitV1(nn.Module):
    """Grouped 1 x 1, shuffle, by channel 3 x 3, grouped 1 x 1; where the size halves, joined with the pooled input."""

    def __init__(self, before: int, after: int, stride: int, groups: int, first: int) -> None:
        super().__init__()
        middle = after // 4
        self.groups = groups if before != first else 1
        self.conv1, self.bn1 = convolved(before, middle, groups=self.groups)
        self.conv2, self.bn2 = convolved(middle, middle, 3, stride, middle)
        self.conv3, self.bn3 = convolved(middle, after, groups=groups)
        self.pool = nn.AvgPool2d(3, 2, 1) if stride == 2 else None
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = shuffled(torch.relu(self.bn1(self.conv1(x))), self.groups)
        y = self.bn3(self.conv3(torch.relu(self.bn2(self.conv2(y)))))
        return self.relu(y + x if self.pool is None else torch.cat([y, self.pool(x)], 1))


class ShuffleNetV1(nn.Module):
    """Three groups; stages at 16, 8 and 4 pixels."""

    def __init__(self, classes: int = 100, groups: int = 3) -> None:
        super().__init__()
        self.conv1, self.bn1 = convolved(3, 24)
        before = 24
        for stage, (after, blocks) in enumerate(((240, 4), (480, 8), (960, 4)), start=1):
            layers = []
            for i in range(blocks):
                new = after - before if i == 0 else after
                layers.append(ShuffleUnitV1(before, new, 2 if i == 0 else 1, groups, 24))
                before = after
            setattr(self, f"layer{stage}", nn.Sequential(*layers))
        self.linear = nn.Linear(before, classes)

    def forward(self, x: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, "batch classes"]:
        x = torch.relu(self.bn1(self.conv1(x)))
        for stage in (1, 2, 3):
            x = getattr(self, f"layer{stage}")(x)
        return self.linear(x.mean((2, 3)))


class ShuffleUnitV2(nn.Module):
    """Half of the channels go through, or, where the size halves, both halves are computed; then all are shuffled."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        half = after // 2
        inside = before if stride == 2 else half
        self.left = None
        if stride == 2:
            self.left = nn.Sequential(*convolved(before, before, 3, 2, before), *convolved(before, half), nn.ReLU())
        self.right = nn.Sequential(
            *convolved(inside, half),
            nn.ReLU(),
            *convolved(half, half, 3, stride, half),
            *convolved(half, half),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.left is None:
            kept, x = x.chunk(2, 1)
        else:
            kept = self.left(x)
        return shuffled(torch.cat([kept, self.right(x)], 1), 2)


class ShuffleNetV2(nn.Module):
    """x1; stages at 16, 8 and 4 pixels."""

    def __init__(self, classes: int = 100) -> None:
        super().__init__()
        self.conv1, self.bn1 = convolved(3, 24)
        before = 24
        for stage, (after, blocks) in enumerate(((116, 4), (232, 8), (464, 4)), start=1):
            layers = [ShuffleUnitV2(before if i == 0 else after, after, 2 if i == 0 else 1) for i in range(blocks)]
            setattr(self, f"layer{stage}", nn.Sequential(*layers))
            before = after
        self.conv2, self.bn2 = convolved(before, 1024)
        self.linear = nn.Linear(1024, classes)

    def forward(self, x: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, "batch classes"]:
        x = torch.relu(self.bn1(self.conv1(x)))
        for stage in (1, 2, 3):
            x = getattr(self, f"layer{stage}")(x)
        return self.linear(torch.relu(self.bn2(self.conv2(x))).mean((2, 3)))
