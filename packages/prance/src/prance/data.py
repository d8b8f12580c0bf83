"""Labelled pictures as networks take them: embedded digits, CIFAR-10 from a data folder, folders of classes."""

import dataclasses
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from papercore.errors import InputError
from torch import Tensor
from torch.utils.data import Dataset

Source = Literal["digits", "cifar10", "folder"]
Part = Literal["train", "test"]
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".avif", ".bmp")


@dataclasses.dataclass(frozen=True)
class Normalisation:
    """(x - mean) / std of pictures in [0, 1], by channel."""

    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)

    def __call__(self, x: Float[Tensor, "*batch channels h w"]) -> Float[Tensor, "*batch channels h w"]:
        mean, std = (x.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (x - mean) / std


IMAGENET = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
NORMALISATIONS = {
    "digits": Normalisation(),
    "cifar10": Normalisation((0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)),
    "folder": IMAGENET,
}


class Pictures(Dataset[tuple[Tensor, int]]):
    """Normalised pictures in memory, with labels.

    Args:
        shift: pixels by which a sample is moved at random, 0 filled in; flip: mirror every second one. Both draw from
            torch's global generator.
    """

    def __init__(
        self,
        images: Float[Tensor, "n channels h w"],
        labels: Int[Tensor, " n"],
        names: list[str],
        *,
        shift: int = 0,
        flip: bool = False,
    ) -> None:
        self.images, self.labels, self.names, self.shift, self.flip = images, labels, names, shift, flip

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.images[index]
        if self.flip and torch.rand(()) < 0.5:
            image = image.flip(-1)
        if self.shift:
            up, left = torch.randint(0, 2 * self.shift + 1, (2,)).tolist()
            padded = torch.nn.functional.pad(image, (self.shift,) * 4)
            image = padded[:, up : up + image.shape[1], left : left + image.shape[2]]
        return image, int(self.labels[index])

    def plain(self) -> "Pictures":
        """The same without random changes."""
        return Pictures(self.images, self.labels, self.names)


def load(
    source: Source, data: Path | None, part: Part, *, size: int | None = None, limit: int | None = None
) -> Pictures:
    """A part of a data set; training parts of CIFAR-10 are shifted and mirrored at random.

    Args:
        size: side of the pictures of a folder.
        limit: take no more than so many.

    Raises:
        InputError: missing or damaged; names the file.
    """
    if source not in get_args(Source):
        raise InputError("data set", found=source, expected=" or ".join(get_args(Source)))
    if limit is not None and limit < 1:
        raise InputError("limit", found=limit, expected="at least 1")
    if source == "digits":
        from papercore.data.digits import digits

        found = digits(part)
        return Pictures(found.images[:limit], found.labels[:limit], [str(k) for k in range(10)])
    if data is None:
        raise InputError("--data", found="nothing", expected=f"the folder of {source}")
    normalise = NORMALISATIONS[source]
    if source == "cifar10":
        from papercore.data.cifar import cifar

        read = cifar(data, part, limit=limit)
        images = normalise(read.images.permute(0, 3, 1, 2).float() / 255)
        train = part == "train"
        return Pictures(images, read.labels, [str(k) for k in range(10)], shift=4 if train else 0, flip=train)
    return folder(data, part, size or 224, limit)


def folder(data: Path, part: Part, size: int, limit: int | None) -> Pictures:
    """part/CLASS/picture; classes in the order of their names.

    Raises:
        InputError: no such folder, an empty class, or a file that is no picture.
    """
    root = Path(data) / part
    classes = sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    if not classes:
        raise InputError(f"no {part} pictures", where=root, expected="a folder for every class")
    images, labels = [], []
    for label, path in enumerate(classes):
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
        if not files:
            raise InputError("no picture", where=path, expected=" or ".join(SUFFIXES))
        for file in files[: None if limit is None else max(1, limit // len(classes))]:
            images.append(read_picture(file, size, IMAGENET))
            labels.append(label)
    return Pictures(torch.stack(images), torch.tensor(labels), [path.name for path in classes])


def read_picture(path: Path, size: int, normalise: Normalisation) -> Float[Tensor, "channels h w"]:
    """A picture of a file, its middle square brought to a size.

    Raises:
        InputError: no picture; names the file.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        picture = Image.open(path).convert("RGB" if len(normalise.mean) == 3 else "L")
    except (UnidentifiedImageError, OSError) as error:
        raise InputError("picture", where=path, found=str(error), expected="a picture") from error
    pixels = np.asarray(ImageOps.fit(picture, (size, size), Image.Resampling.BICUBIC), np.float32) / 255
    x = torch.from_numpy(pixels if pixels.ndim == 3 else pixels[..., None])
    return normalise(x.permute(2, 0, 1))
