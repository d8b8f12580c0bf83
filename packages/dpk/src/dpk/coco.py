"""A sample of COCO from a data folder, as torchvision's detectors take it.

images/coco128/coco128_320.tar and annotations.json.gz: pictures with boxes (class, centre x, centre y, width, height as
fractions of the picture). Nothing is unpacked: the pictures are read from the archive by name.
"""

import gzip
import io
import json
import tarfile
import zlib
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from papercore.errors import InputError
from torch import Tensor


def coco_sample(
    data: Path, split: str = "train2017", *, count: int | None = None
) -> tuple[list[Float[Tensor, "3 h w"]], list[dict[str, Tensor]], list[str]]:
    """(pictures in [0, 1], targets with boxes [n, 4] as x1, y1, x2, y2 in pixels and labels from 1, names of classes).

    Pictures without a box are left out.

    Args:
        split: train2017 or val2017.
        count: no more than so many.

    Raises:
        InputError: a file is missing or damaged, or the split has no picture.
    """
    from PIL import Image, UnidentifiedImageError

    folder = Path(data) / "images" / "coco128"
    notes, archive = folder / "annotations.json.gz", folder / "coco128_320.tar"
    try:
        content = json.loads(gzip.decompress(notes.read_bytes()))
        names = [str(name) for name in content["names"]]
        chosen = [entry for entry in content["images"] if entry["split"] == split]
    except (OSError, EOFError, ValueError, KeyError, TypeError, zlib.error) as error:
        raise InputError("annotations", where=notes, found=str(error), expected="COCO's sample as JSON") from error
    images, targets = [], []
    try:
        with tarfile.open(archive) as tar:
            for entry in chosen:
                boxes = torch.tensor(entry["boxes_cls_cx_cy_w_h_normalised"], dtype=torch.float32)
                if not len(boxes):
                    continue
                member = tar.extractfile(entry["file"])
                if member is None:
                    raise InputError("picture", where=archive, found=entry["file"], expected="a file in the archive")
                pixels = np.asarray(Image.open(io.BytesIO(member.read())).convert("RGB"))
                images.append(torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255)
                targets.append(target(boxes, pixels.shape[1], pixels.shape[0]))
                if len(images) == count:
                    break
    except (OSError, tarfile.TarError, KeyError, UnidentifiedImageError) as error:
        raise InputError("pictures", where=archive, found=str(error), expected="COCO's sample as tar") from error
    if not images:
        raise InputError("split", where=notes, found=split, expected="train2017 or val2017, with a picture with boxes")
    return images, targets, names


def target(boxes: Float[Tensor, "n 5"], width: int, height: int) -> dict[str, Tensor]:
    """(class, centre x, centre y, width, height) in fractions -> corners in pixels, labels from 1."""
    scale = torch.tensor([width, height], dtype=torch.float32)
    centre, half = boxes[:, 1:3] * scale, boxes[:, 3:5] * scale / 2
    return {"boxes": torch.cat([centre - half, centre + half], 1), "labels": boxes[:, 0].long() + 1}
