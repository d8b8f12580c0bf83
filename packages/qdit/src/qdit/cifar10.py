"""CIFAR-10 for the small scale: a trained DiT, real pictures, and the features of a trained ResNet, from a data folder.

weights/cifar10_dit_w256_d8_h4_p4.safetensors and .json     the DiT, diffusers naming
weights/cifar10_resnet56.safetensors                        the classifier (arXiv 1512.03385, section 4.2)
images/cifar10/test_*.webp                                  10 000 test pictures as mosaics of 100 columns
"""

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import DiTTransformer2DModel
from jaxtyping import Float, UInt8
from papercore.errors import InputError
from papercore.rundir import read_json
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from qdit.pipeline import build_model, fill

DIT = "weights/cifar10_dit_w256_d8_h4_p4"
RESNET = "weights/cifar10_resnet56.safetensors"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLASSES = 10


def load_dit(data: Path) -> DiTTransformer2DModel:
    """The trained DiT: 32 x 32 pixels in [-1, 1], patch 4, width 256, depth 8; class 10 stands for no class.

    Raises:
        InputError: a file is missing, damaged, or describes another model.
    """
    description = read_json(data / f"{DIT}.json")
    if not isinstance(description, dict) or not isinstance(description.get("config"), dict):
        raise InputError("config", where=data / f"{DIT}.json", found=json.dumps(description)[:60], expected="a mapping")
    config = {key: value for key, value in description["config"].items() if key != "_class_name"}
    model = build_model(config, data / f"{DIT}.json")
    path = data / f"{DIT}.safetensors"
    fill(model, {name: (value.float(), path) for name, value in read(path).items()})
    return model.eval()


def read(path: Path) -> dict[str, Tensor]:
    """Raises InputError unless `path` is a whole safetensors file."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError("weights", where=path, found=str(error), expected="a safetensors file") from error


def test_images(data: Path) -> UInt8[Tensor, "n 32 32 3"]:
    """The test pictures, in the order of the mosaics; picture i has class i mod 10.

    Raises:
        InputError: none is there.
    """
    from PIL import Image

    paths = sorted((data / "images" / "cifar10").glob("test_*.webp"))
    if not paths:
        raise InputError("no test pictures", where=data / "images" / "cifar10", expected="test_*.webp")
    parts = []
    for path in paths:
        mosaic = np.asarray(Image.open(path).convert("RGB"))
        parts.append(mosaic.reshape(-1, 32, 100, 32, 3).swapaxes(1, 2).reshape(-1, 32, 32, 3))
    return torch.from_numpy(np.concatenate(parts))


class ResNet56(nn.Module):
    """Three stages of nine blocks with 16, 32 and 64 channels; shortcuts without parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        for stage, (before, width) in enumerate(((16, 16), (16, 32), (32, 64)), start=1):
            blocks = [Block(before if i == 0 else width, width, 2 if i == 0 and stage > 1 else 1) for i in range(9)]
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
        self.linear = nn.Linear(64, CLASSES)

    def forward(self, x: Float[Tensor, "n 3 32 32"]) -> tuple[Float[Tensor, "n 64"], Float[Tensor, "n 10"]]:
        """Pooled features and logits of pictures in [0, 1]."""
        mean, std = (x.new_tensor(values)[:, None, None] for values in (MEAN, STD))
        x = torch.relu(self.bn1(self.conv1((x - mean) / std)))
        for stage in (1, 2, 3):
            x = getattr(self, f"layer{stage}")(x)
        pooled = x.mean((2, 3))
        return pooled, self.linear(pooled)


class Block(nn.Module):
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


class ResNetFeatures:
    """A feature space for `qdit.evaluate`: uint8 pictures [n, 32, 32, 3] -> pooled features and probabilities."""

    def __init__(self, data: Path, device: str) -> None:
        self.network, path = ResNet56(), data / RESNET
        counters = {
            name: value for name, value in self.network.state_dict().items() if name.endswith("batches_tracked")
        }
        fill(self.network, {name: (value, path) for name, value in (read(path) | counters).items()})
        self.network.to(device).eval()
        self.device = device

    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        features, probabilities = [], []
        for part in images.split(500):
            pooled, logits = self.network(part.to(self.device).permute(0, 3, 1, 2).float() / 255)
            features.append(pooled.cpu())
            probabilities.append(logits.softmax(1).cpu())
        return {"features": torch.cat(features), "probabilities": torch.cat(probabilities)}
