"""Small networks that several tests use."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oneshot_mpq import Supernet
from torch import nn

GOLDEN = Path(__file__).parent / "golden"


def golden(name: str) -> tuple[Any, dict[str, np.ndarray]]:
    """The JSON and the arrays of a case."""
    notes = json.loads((GOLDEN / f"{name}.json").read_text())
    arrays = GOLDEN / f"{name}.npz"
    return notes, dict(np.load(arrays)) if arrays.exists() else {}


class Small(nn.Module):
    """Layers of the golden training steps: a fixed convolution, three searchable ones (one depthwise), a classifier."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.a, self.abn = nn.Conv2d(8, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.d, self.dbn = nn.Conv2d(8, 8, 3, 1, 1, groups=8, bias=False), nn.BatchNorm2d(8)
        self.p, self.pbn = nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for conv, norm in ((self.conv1, self.bn1), (self.a, self.abn), (self.d, self.dbn), (self.p, self.pbn)):
            x = torch.relu(norm(conv(x)))
        return self.fc(x.mean((2, 3)))


@pytest.fixture
def small() -> Small:
    torch.manual_seed(0)
    return Small()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(16, 3, 10, 10, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def net(small: Small, images: torch.Tensor) -> Supernet:
    """A calibrated supernet of `small`."""
    net = Supernet(small, images[:1])
    net.calibrate(images)
    return net
