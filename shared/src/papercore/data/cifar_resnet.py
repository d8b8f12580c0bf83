"""The residual networks for CIFAR of 6n + 2 layers, and trained ones from a data folder.

weights/cifar10_resnet{20,32,44,56}.safetensors     (He et al., arXiv 1512.03385, section 4.2, shortcuts of option A)
"""

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from papercore.errors import InputError
from papercore.weights import load_exactly, read_tensors

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class CifarResNet(nn.Module):
    """Three stages of n blocks with 16, 32 and 64 channels; shortcuts without parameters.

    Args:
        depth: 6n + 2 layers: 20, 32, 44, 56, 110.
        classes: width of the last layer.
    """

    def __init__(self, depth: int, classes: int = 10) -> None:
        super().__init__()
        if depth < 8 or depth % 6 != 2:
            raise InputError("depth", found=depth, expected="6n + 2, for example 20, 32, 44 or 56")
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        for stage, (before, width) in enumerate(((16, 16), (16, 32), (32, 64)), start=1):
            blocks = [
                CifarBlock(before if i == 0 else width, width, 2 if i == 0 and stage > 1 else 1)
                for i in range(depth // 6)
            ]
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
        self.linear = nn.Linear(64, classes)

    def features(self, x: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 64"]:
        """The mean over space of the last stage, for pictures normalised with MEAN and STD."""
        x = torch.relu(self.bn1(self.conv1(x)))
        for stage in (1, 2, 3):
            x = getattr(self, f"layer{stage}")(x)
        return x.mean((2, 3))

    def forward(self, x: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n classes"]:
        """Logits of pictures normalised with MEAN and STD."""
        return self.linear(self.features(x))


class CifarBlock(nn.Module):
    """Two convolutions and a shortcut; where the size changes it takes every second pixel and pads the channels."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(before, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.stride, self.padding = stride, (width - before) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1:
            x = functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        return torch.relu(y + x)


def normalise(images: Tensor) -> Float[Tensor, "n 3 h w"]:
    """uint8 pictures [n, h, w, 3] as these networks take them."""
    x = images.permute(0, 3, 1, 2).float() / 255
    mean, std = (x.new_tensor(values)[:, None, None] for values in (MEAN, STD))
    return (x - mean) / std


def resnet_file(data: Path, depth: int) -> Path:
    """Where a data folder keeps the trained network of this depth."""
    return Path(data) / "weights" / f"cifar10_resnet{depth}.safetensors"


def load_cifar_resnet(data: Path, depth: int) -> CifarResNet:
    """A network trained on CIFAR-10, in evaluation mode.

    Raises:
        InputError: the file is missing, damaged, or of another network.
    """
    model, path = CifarResNet(depth), resnet_file(data, depth)
    load_exactly(model, read_tensors(path), path)
    return model.eval()


class CifarFeatures:
    """A feature space: uint8 pictures [n, 32, 32, 3] -> pooled features [n, 64] and class probabilities [n, 10].

    Args:
        data: the data folder.
        device: where it is computed; what is returned is on the CPU.
        depth: of the trained network.

    Raises:
        InputError: see `load_cifar_resnet`.
    """

    def __init__(self, data: Path, device: str = "cpu", depth: int = 56) -> None:
        self.network, self.device = load_cifar_resnet(data, depth).to(device), device

    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        features, probabilities = [], []
        for part in images.split(500):
            pooled = self.network.features(normalise(part.to(self.device)))
            features.append(pooled.cpu())
            probabilities.append(self.network.linear(pooled).softmax(1).cpu())
        return {"features": torch.cat(features), "probabilities": torch.cat(probabilities)}
