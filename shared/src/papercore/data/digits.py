"""scikit-learn's handwritten digits as tensors: 1797 grey images of 8 x 8 pixels in ten classes.

Values 0..16 become value / 8 - 1, in [-1, 1]. Every fifth image of the data set is the test part. (UCI Optical
Recognition of Handwritten Digits, test partition; ships with scikit-learn, so nothing is downloaded.)
"""

import functools
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

CLASSES = 10
WEIGHTS = Path(__file__).with_name("digits_classifier.safetensors")


class Digits(NamedTuple):
    images: Float[Tensor, "n 1 8 8"]
    labels: Int[Tensor, " n"]


@functools.cache
def _all() -> Digits:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32).div(8).sub(1)[:, None]  # pyright: ignore[reportAttributeAccessIssue]
    return Digits(images, torch.tensor(bunch.target, dtype=torch.long))  # pyright: ignore[reportAttributeAccessIssue]


def digits(part: Literal["all", "train", "test"] = "all") -> Digits:
    """The whole set (1797), four fifths of it (1438), or the other fifth (359)."""
    whole = _all()
    held_out = torch.arange(len(whole.labels)) % 5 == 4
    chosen = {"all": torch.ones_like(held_out), "train": ~held_out, "test": held_out}[part]
    return Digits(whole.images[chosen].clone(), whole.labels[chosen].clone())


class DigitsClassifier(nn.Module):
    """A small convolutional network; `features` is its 64-dimensional last hidden layer after ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.third = nn.Linear(32 * 16, 64)
        self.last = nn.Linear(64, CLASSES)

    def features(self, x: Float[Tensor, "n 1 8 8"]) -> Float[Tensor, "n 64"]:
        x = torch.relu(self.second(torch.relu(self.first(x))))
        return torch.relu(self.third(x.flatten(1)))

    def forward(self, x: Float[Tensor, "n 1 8 8"]) -> Float[Tensor, "n 10"]:
        return self.last(self.features(x))


def train_classifier(seed: int = 0, epochs: int = 30) -> DigitsClassifier:
    """The classifier trained on the training part, on the CPU; half of the batches are shifted by up to a pixel."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model, (images, labels) = DigitsClassifier(), digits("train")
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-len(labels) // 64))
    for _ in range(epochs):
        for chosen in torch.randperm(len(labels), generator=generator).split(64):
            x = images[chosen]
            if torch.rand((), generator=generator) < 0.5:
                top, left = torch.randint(0, 3, (2,), generator=generator).tolist()
                x = nn.functional.pad(x, (1, 1, 1, 1), value=-1)[:, :, top : top + 8, left : left + 8]
            x = x + 0.1 * torch.randn(x.shape, generator=generator)
            loss = nn.functional.cross_entropy(model(x), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@functools.cache
def classifier() -> DigitsClassifier:
    """The classifier with the weights that ship with this package (`python -m papercore.data.digits` makes them)."""
    from safetensors.torch import load_file

    model = DigitsClassifier()
    model.load_state_dict(load_file(WEIGHTS))
    return model.eval()


@torch.no_grad()
def features(images: Float[Tensor, "n 1 8 8"]) -> Float[Tensor, "n 64"]:
    """The shipped classifier's features, in which distances between sets of digits are measured."""
    return torch.cat([classifier().features(part) for part in images.split(512)]) if len(images) else torch.empty(0, 64)


if __name__ == "__main__":
    from safetensors.torch import save

    WEIGHTS.write_bytes(save(train_classifier().state_dict()))
