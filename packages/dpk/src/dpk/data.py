"""Labelled pictures from what people have, and how networks are given them.

digits      scikit-learn's handwritten digits, embedded
cifar10, cifar100   a data folder with mosaics (images/cifar10/train_*.avif ...), or CIFAR's binary files (*.bin)
npz         a folder with train.npz and test.npz: x uint8 [n, h, w, channels], y whole numbers [n]
folder      train/CLASS/* and test/CLASS/* (or val), any format that Pillow reads

CIFAR's "python version" consists of pickles, which run code when they are read; they are refused.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from papercore.errors import InputError
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset

Source = Literal["digits", "cifar10", "cifar100", "npz", "folder"]
Part = Literal["train", "test"]


class Pictures(Dataset[tuple[Tensor, Tensor]]):
    """Pictures in memory: (uint8 [h, w, channels], label)."""

    def __init__(
        self, images: UInt8[Tensor, "n h w channels"], labels: Int[Tensor, " n"], names: Sequence[str]
    ) -> None:
        self.images, self.labels, self.names = images, labels, list(names)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]

    @property
    def classes(self) -> int:
        return len(self.names)


@dataclasses.dataclass(frozen=True)
class Normalise:
    """Pictures -> what networks take: a random shift and flip with a generator, then (x / 255 - mean) / std.

    Args:
        shift: pixels of zero padding around, from which a crop of the old size is taken; 0: none.
        flip: mirror every second picture, at random.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    shift: int = 0
    flip: bool = False

    def __call__(
        self, images: UInt8[Tensor, "b h w channels"], generator: torch.Generator | None
    ) -> Float[Tensor, "b channels h w"]:
        x = images.permute(0, 3, 1, 2)
        if generator is not None:
            x = augment(x, self.shift, self.flip, generator)
        # one multiplication and one addition; constants of the device are filled there, not copied to it
        scale = torch.stack([torch.full((), 1 / (255 * s), device=x.device) for s in self.std])
        offset = torch.stack(
            [torch.full((), -m / s, device=x.device) for m, s in zip(self.mean, self.std, strict=True)]
        )
        return (x.float() * scale[:, None, None] + offset[:, None, None]).contiguous()


def augment(x: Tensor, shift: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Every picture of [B, C, H, W] shifted by up to `shift` pixels and, one in two, mirrored; on its device."""
    count, height, width = len(x), *x.shape[-2:]
    rows, columns = (torch.arange(side, device=x.device).expand(count, side) for side in (height, width))
    if flip:
        mirrored = torch.rand(count, 1, generator=generator, device=x.device) < 0.5
        columns = torch.where(mirrored, width - 1 - columns, columns)
    if shift:
        moves = torch.randint(0, 2 * shift + 1, (2, count, 1), generator=generator, device=x.device)
        x = functional.pad(x, (shift, shift, shift, shift))
        rows, columns = rows + moves[0], columns + moves[1]
    picked = torch.arange(count, device=x.device)[:, None, None]
    return x.permute(0, 2, 3, 1)[picked, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


STATISTICS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "digits": ((0.5,), (0.5,)),
    "cifar10": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # what the usual pretrained networks were given
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
}
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def normalisation(source: Source, channels: int = 3) -> Normalise:
    """As the field does it: CIFAR is shifted by up to 4 pixels and mirrored, digits are only scaled."""
    mean, std = STATISTICS.get(source, IMAGENET)
    if len(mean) != channels:
        mean, std = (0.5,) * channels, (0.5,) * channels
    augmented = source != "digits"
    return Normalise(mean, std, 4 if augmented else 0, augmented)


def read(source: Source, data: Path | None, part: Part, *, size: int | None = None) -> Pictures:
    """One part of a data set, in memory.

    Args:
        size: side of the pictures of a folder: the shorter side is brought to it and the middle is taken.

    Raises:
        InputError: missing, damaged or of another format; names the file.
    """
    if source not in get_args(Source):
        raise InputError("data set", found=source, expected=" or ".join(get_args(Source)))
    if source == "digits":
        from papercore.data.digits import digits

        found = digits(part)
        images = ((found.images + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
        return Pictures(images, found.labels, [str(k) for k in range(10)])
    if data is None:
        raise InputError("--data", found="nothing", expected=f"the folder of {source}")
    data = Path(data)
    if source == "npz":
        return read_npz(data / f"{part}.npz")
    if source == "folder":
        return read_folder(data, part, size)
    return read_cifar(data, part, source)


def read_cifar(data: Path, part: Part, source: Literal["cifar10", "cifar100"]) -> Pictures:
    """CIFAR from mosaics or from its binary version."""
    from papercore.data.cifar import CLASSES, cifar

    names = [str(k) for k in range(CLASSES[source])]
    if source == "cifar10":
        patterns = {"train": "data_batch_?.bin", "test": "test_batch.bin"}
    else:
        patterns = {"train": "train.bin", "test": "test.bin"}
    binaries = sorted(data.glob(patterns[part])) + sorted(data.glob(f"*/{patterns[part]}"))
    if binaries:
        ahead = 1 if source == "cifar10" else 2  # CIFAR-100 has the coarse label before the fine one
        records = []
        for path in binaries:
            raw = np.fromfile(path, np.uint8)
            if not len(raw) or len(raw) % (ahead + 3072):
                raise InputError(
                    "size", where=path, found=f"{len(raw)} bytes", expected=f"records of {ahead + 3072} bytes"
                )
            records.append(raw.reshape(-1, ahead + 3072))
        table = np.concatenate(records)
        labels = torch.from_numpy(table[:, ahead - 1].astype(np.int64))
        if int(labels.max()) >= len(names):
            raise InputError("label", where=binaries[0], found=int(labels.max()), expected=f"below {len(names)}")
        images = table[:, ahead:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        return Pictures(torch.from_numpy(np.ascontiguousarray(images)), labels, names)
    for folder in (data, data / "cifar-10-batches-py", data / "cifar-100-python"):
        if any((folder / name).is_file() for name in ("data_batch_1", "meta", "batches.meta")):
            raise InputError(
                "pickled CIFAR", where=folder, expected="the binary version (*.bin), mosaics or .npz: pickles run code"
            )
    return Pictures(*cifar(data, part, source), names)


def read_npz(path: Path) -> Pictures:
    """x uint8 [n, h, w, channels] and y whole numbers [n]."""
    from papercore.images import read_arrays

    arrays: dict[str, Any] = read_arrays(path)
    for name in ("x", "y"):
        if name not in arrays:
            raise InputError(f"key {name}", where=path, found=", ".join(arrays) or "no array", expected="x and y")
    x, y = arrays["x"], arrays["y"]
    if x.dtype != np.uint8 or x.ndim != 4:
        raise InputError("x", where=path, found=f"{x.dtype} {x.shape}", expected="uint8 [n, h, w, channels]")
    if y.dtype.kind not in "iu" or y.shape != x.shape[:1] or not len(y):
        raise InputError("y", where=path, found=f"{y.dtype} {y.shape}", expected=f"whole numbers, {x.shape[:1]}")
    if int(y.min()) < 0:
        raise InputError("y", where=path, found=int(y.min()), expected="at least 0")
    return Pictures(
        torch.from_numpy(x), torch.from_numpy(y.astype(np.int64)), [str(k) for k in range(int(y.max()) + 1)]
    )


def read_folder(data: Path, part: Part, size: int | None) -> Pictures:
    """A folder for every class; classes in the order of their names."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    folder = next(
        (data / name for name in ((part, "val") if part == "test" else (part,)) if (data / name).is_dir()), None
    )
    names = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder else []
    if folder is None or not names:
        raise InputError(f"no {part} pictures", where=data, expected=f"{part}/CLASS/*")
    images, labels = [], []
    for label, name in enumerate(names):
        for path in sorted((folder / name).iterdir()):
            try:
                picture = Image.open(path).convert("RGB")
            except (UnidentifiedImageError, OSError) as error:
                raise InputError("picture", where=path, found=str(error), expected="a picture") from error
            if size is not None:
                picture = ImageOps.fit(picture, (size, size), Image.Resampling.BILINEAR)
            images.append(np.asarray(picture))
            labels.append(label)
            if images[-1].shape != images[0].shape:
                raise InputError(
                    "size", where=path, found=images[-1].shape[:2], expected=images[0].shape[:2], hint="--size"
                )
    if not images:
        raise InputError(f"no {part} pictures", where=folder, expected="pictures in the folders of the classes")
    return Pictures(torch.from_numpy(np.stack(images)), torch.tensor(labels), names)
