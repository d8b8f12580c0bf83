"""CIFAR-10 and CIFAR-100 from a data folder that holds them as mosaics.

images/cifar10/{train,test}_*.{avif,webp,png}, images/cifar100/...: mosaics of 100 pictures of 32 x 32 pixels a row,
without borders, to be read row by row, file by file. Picture i of a part has label i mod the number of classes.
(Krizhevsky, "Learning multiple layers of features from tiny images", 2009.)
"""

from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from papercore.errors import InputError

CLASSES = {"cifar10": 10, "cifar100": 100}
SIDE, COLUMNS = 32, 100


class Pictures(NamedTuple):
    images: UInt8[Tensor, "n 32 32 3"]
    labels: Int[Tensor, " n"]


def cifar(
    data: Path,
    part: Literal["train", "test"],
    name: Literal["cifar10", "cifar100"] = "cifar10",
    *,
    limit: int | None = None,
) -> Pictures:
    """The pictures of a part with their labels, in the order of the mosaics.

    Args:
        data: the data folder.
        limit: read no more than so many; a multiple of the number of classes keeps the classes balanced.

    Raises:
        InputError: none is there, or a file is damaged or no mosaic.
    """
    from PIL import Image, UnidentifiedImageError

    folder = Path(data) / "images" / name
    paths = sorted(path for path in folder.glob(f"{part}_*") if path.suffix in (".avif", ".webp", ".png"))
    if not paths:
        raise InputError(f"no {part} pictures", where=folder, expected=f"{part}_*.avif, .webp or .png")
    parts: list[np.ndarray] = []
    for path in paths:
        try:
            mosaic = np.asarray(Image.open(path).convert("RGB"))
        except (UnidentifiedImageError, OSError) as error:
            raise InputError("picture", where=path, found=str(error), expected="a mosaic of pictures") from error
        if mosaic.shape[0] % SIDE or mosaic.shape[1] != SIDE * COLUMNS:
            raise InputError(
                "size of a mosaic", where=path, found=mosaic.shape[:2], expected="rows of 32, 3200 columns"
            )
        parts.append(mosaic.reshape(-1, SIDE, COLUMNS, SIDE, 3).swapaxes(1, 2).reshape(-1, SIDE, SIDE, 3))
        if limit is not None and sum(map(len, parts)) >= limit:
            break
    images = torch.from_numpy(np.concatenate(parts)[:limit])
    return Pictures(images, torch.arange(len(images)) % CLASSES[name])
