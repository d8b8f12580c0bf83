"""Write a configuration as ONNX."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from papercore import cli
from papercore.errors import InputError

from oneshot_mpq.commands.options import Device, Positional


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export(cli.Command):
    """Write a configuration of a supernet as ONNX, with integer weights, compared with torch's outputs.

    The batch norms first see training images at these bits; the comparison is on search images.
    """

    supernet: Positional[Path]
    """folder that train wrote"""
    bits: Positional[Path]
    """JSON file of the configuration"""
    out: Path
    """the ONNX file"""
    data: Path | None = None
    """data folder, for CIFAR and folders of pictures"""
    storage: Literal["packed", "int8"] = "packed"
    """integers of 2, 4 and 8 bits as the weights need, or 8 bits for all"""
    recalibration: int = 7000
    """training images behind the batch-norm statistics"""
    images: int = 32
    """search images that the outputs are compared on"""
    device: Device = "auto"
    """where the batch norms see their images"""

    def run(self) -> Mapping[str, Any]:
        if self.recalibration < 1 or self.images < 1:
            raise InputError("--recalibration, --images", found=min(self.recalibration, self.images), expected=">= 1")
        if self.out.is_dir():
            raise InputError("--out", found=f"the folder {self.out}", expected="the name of a file")
        import torch
        from papercore.report import Table
        from torch.utils.data import DataLoader

        from oneshot_mpq.bitconfig import BitConfig
        from oneshot_mpq.export import export_onnx
        from oneshot_mpq.recalibrate import recalibrate
        from oneshot_mpq.workflow import open_project

        config = BitConfig.load(self.bits)
        net, splits = open_project(self.supernet, self.data, device=self.device)
        net.set_bits(config)
        recalibrate(net, DataLoader(splits.plain, 500), images=self.recalibration)
        count = min(self.images, len(splits.search))  # pyright: ignore[reportArgumentType]
        images = torch.stack([splits.search[i][0] for i in range(count)])
        done = export_onnx(net, config, self.out, self.storage, images=images)
        rows = [
            ("integer weights in the file (bytes)", done.weight_bytes),
            ("what the bits alone would take (bytes)", done.nominal_bytes),
            ("file (bytes)", done.file_bytes),
            ("opset", done.opset),
            ("difference to torch, graph as written", done.difference),
            ("difference to torch, optimised by onnxruntime", done.optimised_difference),
        ]
        return {"exported": Table(str(self.out), ("", "value"), rows)}
