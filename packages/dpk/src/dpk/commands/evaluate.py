"""`dpk evaluate`."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from papercore import cli

from dpk.commands.options import Dataset, Device, Positional, make_network


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate(cli.Command):
    """Measure a student's (or any network's) accuracy on the test pictures."""

    weights: Positional[Path]
    """safetensors, or the folder that `dpk train` wrote"""
    network: str
    """its name, as for train"""
    dataset: Dataset = "digits"
    """what --data holds; digits are embedded"""
    data: Path | None = None
    """folder of the data set"""
    size: int | None = None
    """side of the pictures of a folder, in pixels"""
    batch_size: int = 256
    """pictures at a time"""
    device: Device = "auto"
    """where to compute"""

    def run(self) -> Mapping[str, Any]:
        from papercore.errors import InputError

        from dpk.data import normalisation, read
        from dpk.training import evaluate

        if self.batch_size < 1:
            raise InputError("--batch-size", found=self.batch_size, expected="at least 1")
        path = self.weights / "student.safetensors" if self.weights.is_dir() else self.weights
        pictures = read(self.dataset, self.data, "test", size=self.size)
        channels = pictures.images.shape[3]
        network = make_network(self.network, pictures.classes, channels, 0, path)
        metrics = evaluate(
            network,
            pictures,
            batch_size=self.batch_size,
            device=self.device,
            prepare=normalisation(self.dataset, channels),
        )
        return {"top-1": metrics.top1, "top-5": metrics.top5, "loss": metrics.loss, "pictures": metrics.samples}
