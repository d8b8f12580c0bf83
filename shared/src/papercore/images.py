"""Images as evaluators exchange them: uint8, channels last, in `.npz` files under the key `arr_0`."""

import io
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy.typing import NDArray
from torch import Tensor

from papercore.errors import InputError
from papercore.rundir import atomic


def images_to_uint8(decoded: Float[Tensor, "n channels height width"]) -> UInt8[Tensor, "n height width channels"]:
    """[-1, 1] -> 0..255: truncate(clip(127.5 x + 128, 0, 255)). (Evaluator of guided-diffusion, arXiv 2105.05233.)"""
    return (127.5 * decoded.float() + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def images_from_uint8(images: UInt8[Tensor, "n height width channels"]) -> Float[Tensor, "n channels height width"]:
    """0..255 -> [-1, 1], the middle of each step of `images_to_uint8`."""
    return (images.float() - 127.5).div(127.5).permute(0, 3, 1, 2).contiguous()


def write_images(path: Path, images: UInt8[Tensor, "n height width channels"]) -> None:
    with atomic(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, arr_0=images.numpy())


def read_images(path: Path) -> UInt8[Tensor, "n height width channels"]:
    """The images of an `.npz` file.

    Raises:
        InputError: not such a file, no `arr_0`, or not uint8 images; pickled arrays are refused.
    """
    arrays = read_arrays(path, only="arr_0")
    if "arr_0" not in arrays:
        raise InputError("key arr_0", where=path, found=", ".join(arrays) or "no array", expected="arr_0")
    images = arrays["arr_0"]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise InputError(
            "arr_0", where=path, found=f"{images.dtype} {images.shape}", expected="uint8 [n, height, width, 1 or 3]"
        )
    return torch.from_numpy(images)


def read_arrays(path: Path, *, only: str | None = None, without: str | None = None) -> dict[str, NDArray[Any]]:
    """The arrays of an `.npz` file; with `only`, the others are empty, with `without`, that one is left out.

    Raises:
        InputError: not such a file, or damaged; pickled arrays are refused.
    """
    try:
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise InputError("not an archive", where=path, found="a single array", expected=".npz")
            names = [name for name in archive.files if name != without]
            arrays = {name: archive[name] if only in (None, name) else np.empty(0) for name in names}
    except InputError:
        raise
    except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError("cannot be read as .npz", where=path, found=str(error), expected="an .npz file") from error
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray):
            raise InputError(f"key {name}", where=path, found=type(array).__name__, expected="an array")
    return arrays


def grid_png(images: UInt8[Tensor, "n height width channels"], columns: int, *, zoom: int = 1, gap: int = 1) -> bytes:
    """The images as one PNG, row by row, `columns` a row, each pixel enlarged `zoom` times."""
    if len(images) == 0 or columns < 1:
        raise InputError(
            "picture grid", found=f"{len(images)} images in {columns} columns", expected="at least one of each"
        )
    tiles = np.repeat(np.repeat(images.numpy(), zoom, 1), zoom, 2)
    height, width = tiles.shape[1] + gap, tiles.shape[2] + gap
    rows = -(-len(tiles) // columns)
    canvas = np.full((rows * height + gap, columns * width + gap, tiles.shape[3]), 255, np.uint8)
    for i, tile in enumerate(tiles):
        top, left = i // columns * height + gap, i % columns * width + gap
        canvas[top : top + tile.shape[0], left : left + tile.shape[1]] = tile
    return png(canvas)


def png(pixels: NDArray[np.uint8]) -> bytes:
    """[height, width, 1 or 3] -> PNG."""
    from PIL import Image

    data = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(data, format="PNG")
    return data.getvalue()
