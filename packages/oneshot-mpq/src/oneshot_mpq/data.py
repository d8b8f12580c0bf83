"""Training, search and test images. The search part is never tested on, and the test part never searched on."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from papercore.data.cifar import CLASSES, cifar
from papercore.data.cifar_resnet import normalise
from papercore.data.digits import digits
from papercore.errors import InputError
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset

Name = Literal["digits", "cifar10", "cifar100", "folder"]
NOISE = 0.5
"""standard deviation of the noise on the digits, whose values are in [-1, 1]: a quarter of the range"""


class Splits(NamedTuple):
    """The parts of a data set; items are (image [channels, height, width], class)."""

    train: Dataset[Any]
    """augmented, if the data set is"""
    plain: Dataset[Any]
    """the same images without augmentation, for batch-norm statistics"""
    search: Dataset[Any]
    test: Dataset[Any]
    classes: int
    shape: tuple[int, int, int]


class Shifted(Dataset[Any]):
    """Images padded by four pixels, cropped at random and mirrored at random, with torch's global generator."""

    def __init__(self, images: Float[Tensor, "n c h w"], labels: Int[Tensor, " n"]) -> None:
        self.tensors = (images, labels)
        self.padded = torch.nn.functional.pad(images, (4, 4, 4, 4))

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """A whole batch, which is what the loader asks for."""
        chosen = torch.as_tensor(indices)
        images, labels = self.padded[chosen], self.tensors[1][chosen]
        height, width = self.tensors[0].shape[2:]
        top, left = torch.randint(0, 9, (2, len(chosen), 1))
        rows, columns = top + torch.arange(height), left + torch.arange(width)
        columns = torch.where(torch.rand(len(chosen), 1) < 0.5, columns.flip(1), columns)
        which = torch.arange(len(chosen))
        cut = images.permute(0, 2, 3, 1)[which[:, None, None], rows[:, :, None], columns[:, None, :]]
        return list(zip(cut.permute(0, 3, 1, 2), labels, strict=True))


def load_splits(
    name: Name, data: Path | None = None, *, seed: int = 0, size: int = 224, limit: int | None = None
) -> Splits:
    """The parts of a data set.

    digits: scikit-learn's, with Gaussian noise so that few bits hurt; 1000, 200 and 597 images drawn by the seed.
    cifar10, cifar100: mosaics in `data` (see papercore.data.cifar); the last tenth of the training part is for search.
    folder: `data`/train/CLASS/* and `data`/val/CLASS/* (test); a tenth of train, drawn by the seed, is for search.

    Args:
        size: height and width of the pictures of a folder.
        limit: no more than so many images of a part (CIFAR).

    Raises:
        InputError: `data` is missing where it is needed, or holds something else.
    """
    if name == "digits":
        return _digits(seed)
    if data is None:
        raise InputError("--data", found="nothing", expected=f"the folder that holds {name}")
    if name == "folder":
        return _folder(Path(data), seed, size)
    train, test = cifar(data, "train", name, limit=limit), cifar(data, "test", name, limit=limit)
    images, labels = normalise(train.images), train.labels
    cut = len(images) - len(images) // 10
    return Splits(
        Shifted(images[:cut], labels[:cut]),
        TensorDataset(images[:cut], labels[:cut]),
        TensorDataset(images[cut:], labels[cut:]),
        TensorDataset(normalise(test.images), test.labels),
        CLASSES[name],
        (3, 32, 32),
    )


def _digits(seed: int) -> Splits:
    images, labels = digits()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator)
    noisy = (images + NOISE * torch.randn(images.shape, generator=generator))[order]
    parts = [
        TensorDataset(x, y)
        for x, y in zip(noisy.split((1000, 200, 597)), labels[order].split((1000, 200, 597)), strict=True)
    ]
    return Splits(parts[0], *parts, classes=10, shape=(1, 8, 8))


def _folder(data: Path, seed: int, size: int) -> Splits:
    from timm.data import create_transform  # pyright: ignore[reportPrivateImportUsage]
    from torchvision.datasets import ImageFolder

    augment: Any = create_transform(size, is_training=True, auto_augment=None)
    transform: Any = create_transform(size)
    try:
        augmented = ImageFolder(str(data / "train"), augment)
        plain = ImageFolder(str(data / "train"), transform)
        test = ImageFolder(str(data / "val"), transform)
    except (OSError, FileNotFoundError) as error:
        raise InputError("pictures", where=data, found=str(error), expected="train/CLASS/* and val/CLASS/*") from error
    if plain.classes != test.classes:
        raise InputError("classes", where=data, found="other folders in val than in train", expected="the same")
    order = torch.randperm(len(plain), generator=torch.Generator().manual_seed(seed)).tolist()
    cut = len(order) - max(1, len(order) // 10)
    return Splits(
        Subset(augmented, order[:cut]),
        Subset(plain, order[:cut]),
        Subset(plain, order[cut:]),
        test,
        len(plain.classes),
        (3, size, size),
    )
