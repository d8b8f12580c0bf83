"""The tiny setting: noisy handwritten digits, a small student, a small and a large teacher (specification 4.1)."""

import dataclasses
from pathlib import Path

import torch
from jaxtyping import Float
from papercore import training as loop
from papercore.data.digits import CLASSES, digits
from papercore.training import TrainConfig
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

NOISE = 0.25
"""standard deviation of the noise, of full scale"""
TEACHING, STUDENT = 1100, 600
"""images that teachers are trained on, and the first of these, which students are trained on; 697 remain for tests"""


class DigitsNet(nn.Module):
    """A stem and two stages of convolutions with batch norm and ReLU, at 8 x 8 and 4 x 4 pixels.

    Args:
        stem: channels of the first convolution.
        widths: channels of the two stages.
        depth: convolutions of a stage.
    """

    def __init__(self, stem: int, widths: tuple[int, int], depth: int) -> None:
        super().__init__()

        def convolutions(before: int, width: int, count: int, stride: int) -> nn.Sequential:
            layers: list[nn.Module] = []
            for index in range(count):
                layers += [
                    nn.Conv2d(before if index == 0 else width, width, 3, stride if index == 0 else 1, 1, bias=False),
                    nn.BatchNorm2d(width),
                    nn.ReLU(),
                ]
            return nn.Sequential(*layers)

        self.stem = convolutions(1, stem, 1, 1)
        self.stage1 = convolutions(stem, widths[0], depth, 1)
        self.stage2 = convolutions(widths[0], widths[1], depth, 2)
        self.head = nn.Linear(widths[1], CLASSES)

    def forward(self, x: Float[Tensor, "n 1 8 8"]) -> Float[Tensor, "n 10"]:
        return self.head(self.stage2(self.stage1(self.stem(x))).mean((2, 3)))


SIZES: dict[str, tuple[int, tuple[int, int], int]] = {
    "student": (6, (6, 12), 1),
    "small": (8, (8, 16), 2),
    "large": (32, (32, 64), 3),
}


def digits_net(size: str, seed: int) -> DigitsNet:
    """An untrained network of `SIZES`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DigitsNet(*SIZES[size])


@dataclasses.dataclass(frozen=True)
class NoisyDigits:
    """Three parts of the digits; every image has its noise once and for all."""

    teaching: TensorDataset
    student: TensorDataset
    test: TensorDataset


def noisy_digits(seed: int) -> NoisyDigits:
    """The order of the images and their noise come from the seed."""
    generator = torch.Generator().manual_seed(seed)
    images, labels = digits("all")
    order = torch.randperm(len(labels), generator=generator)
    # full scale is 2: the images are in [-1, 1]
    images = images[order] + 2 * NOISE * torch.randn(images.shape, generator=generator)
    labels = labels[order]
    parts = (slice(TEACHING), slice(STUDENT), slice(TEACHING, None))
    return NoisyDigits(*(TensorDataset(images[part], labels[part]) for part in parts))


SOLVER = TrainConfig(
    steps=25 * round(STUDENT / 64),
    batch_size=64,
    learning_rate=0.05,
    optimizer="sgd",
    nesterov=True,
    weight_decay=5e-4,
    clip_norm=5.0,
    checkpoint_every=10_000,
)
"""of students: 25 epochs"""


def train_teacher(size: str, data: NoisyDigits, out: Path, seed: int, *, epochs: int = 25, label: str) -> nn.Module:
    """A trained teacher, frozen; taken from `out` if it is there."""
    config = dataclasses.replace(SOLVER, steps=epochs * round(TEACHING / SOLVER.batch_size), seed=seed)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor], generator: torch.Generator) -> Tensor:
        return functional.cross_entropy(model(batch[0]), batch[1])

    provenance = {"teacher": size, "data_seed": seed}
    return loop.train(
        digits_net(size, seed), data.teaching, loss, config, out, device="cpu", label=label, provenance=provenance
    ).model
