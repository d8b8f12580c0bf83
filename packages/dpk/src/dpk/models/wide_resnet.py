"""Wide residual networks WRN-d-k with pre-activation blocks (Zagoruyko & Komodakis, arXiv 1605.07146)."""

import torch
from jaxtyping import Float
from papercore.errors import InputError
from torch import Tensor, nn


class PreActivation(nn.Module):
    """BN, ReLU, convolution, twice; where channels change the shortcut starts after the first ReLU."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(before), nn.Conv2d(before, width, 3, stride, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.shortcut = None if before == width else nn.Conv2d(before, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(x))
        kept = x if self.shortcut is None else self.shortcut(y)
        return self.conv2(torch.relu(self.bn2(self.conv1(y)))) + kept


class WideResNet(nn.Module):
    """Three stages of (depth - 4) / 6 blocks with 16k, 32k and 64k channels.

    A stage's output has no activation; the last one is followed by BN and ReLU.

    Raises:
        InputError: a depth that is not 6n + 4, or a width below 1.
    """

    def __init__(self, depth: int, width: int, classes: int = 100) -> None:
        super().__init__()
        if depth < 10 or depth % 6 != 4 or width < 1:
            raise InputError("depth, width", found=(depth, width), expected="6n + 4 and at least 1")
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        before = 16
        for stage in (1, 2, 3):
            after, blocks = 8 * 2**stage * width, []
            for i in range(depth // 6):
                blocks.append(PreActivation(before, after, 2 if i == 0 and stage > 1 else 1))
                before = after
            setattr(self, f"block{stage}", nn.Sequential(*blocks))
        self.bn1, self.relu = nn.BatchNorm2d(before), nn.ReLU()
        self.fc = nn.Linear(before, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, "batch classes"]:
        x = self.conv1(x)
        for stage in (1, 2, 3):
            x = getattr(self, f"block{stage}")(x)
        return self.fc(self.relu(self.bn1(x)).mean((2, 3)))
