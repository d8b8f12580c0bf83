"""`prance show`: which patches every image keeps and merges."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import tyro
from papercore import cli
from papercore.errors import InputError

from prance.commands.network import open_network, static_decision

KINDS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""of ImageNet, in red, green, blue"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Show(cli.Command):
    """Draw the kept and merged patches of images after every decision of a static configuration.

    Images are resized so that the shorter side fits, cropped in the middle, and normalised as for ImageNet.
    """

    images: tyro.conf.Positional[tuple[Path, ...]]
    """pictures, or folders of them"""
    model: str
    """name of a timm vision transformer, or a file of published weights (with --size)"""
    out: Path = Path("patches.png")
    """picture to write: .png, .svg or .pdf"""
    size: Literal["tiny", "small", "base"] | None = None
    """space of published weights"""
    pretrained: bool = False
    """download the timm model's weights; random ones otherwise"""
    prune: tuple[float, ...] = ()
    """shares of tokens that pruning keeps at the decision points"""
    merge: tuple[float, ...] = ()
    """shares left after merging"""
    most: int = 8
    """images that are drawn"""

    def run(self) -> Mapping[str, Any]:
        import torch

        from prance.executor import execute
        from prance.pictures import kept_patches, save

        if self.most < 1:
            raise InputError("--most", found=self.most, expected="at least 1")
        net = open_network(self.model, self.size, pretrained=self.pretrained)
        if net.channels != 3:
            raise InputError("--model", found=f"{net.channels} channels", expected="3, for pictures")
        decision = static_decision(net.space, (), (), self.prune, self.merge)
        paths = found_pictures(self.images)[: self.most]
        pictures = torch.stack([read_picture(path, net.image_size) for path in paths])
        mean, deviation = (torch.tensor(values)[:, None, None] for values in (MEAN, DEVIATION))
        with torch.no_grad():
            outcome = execute(net, (pictures - mean) / deviation, decision, path="sliced")
        figure = kept_patches(
            pictures, outcome, prefix=net.prefix, titles=[path.name for path in paths], most=self.most
        )
        return {
            "picture": save(figure, self.out),
            "images": [str(path) for path in paths],
            "tokens": outcome.count.tolist(),
        }


def found_pictures(paths: tuple[Path, ...]) -> list[Path]:
    """The files, and those in the folders, in order.

    Raises:
        InputError: a path that is not there, or no picture at all.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            found += sorted(file for file in path.iterdir() if file.suffix.lower() in KINDS)
        elif path.is_file():
            found.append(path)
        else:
            raise InputError("no such file or folder", where=path)
    if not found:
        raise InputError("pictures", found="none", expected=f"files that end in {', '.join(KINDS)}")
    return found


def read_picture(path: Path, size: int) -> Any:
    """[3, size, size] in [0, 1].

    Raises:
        InputError: a file that is not a picture.
    """
    import numpy as np
    import torch
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as opened:
            image = ImageOps.fit(opened.convert("RGB"), (size, size), Image.Resampling.BICUBIC)
    except (UnidentifiedImageError, OSError) as error:
        raise InputError("not a picture", where=path, found=str(error), expected=", ".join(KINDS)) from error
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
