"""Small networks that several tests use."""

import pytest
import torch
from torch import Tensor, nn


class Net(nn.Module):
    """Two stages at strides 1 and 2 with batch norm and a ReLU at the end, and a linear classifier."""

    def __init__(self, width: int, classes: int = 10, channels: int = 1) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, width, 3, padding=1)
        self.stage1 = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
        self.stage2 = nn.Sequential(nn.Conv2d(width, 2 * width, 3, 2, 1), nn.BatchNorm2d(2 * width), nn.ReLU())
        self.head = nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stage2(self.stage1(torch.relu(self.stem(x)))).mean((2, 3)))


@pytest.fixture
def net():
    """Makes a network with weights from a seed."""

    def make(width: int = 6, seed: int = 0, **given: int) -> Net:
        torch.manual_seed(seed)
        return Net(width, **given)

    return make


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    """16 images and labels."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(16, 1, 8, 8, generator=generator), torch.randint(10, (16,), generator=generator)
