"""Measure configurations on the test images."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from papercore import cli
from papercore.errors import InputError

from oneshot_mpq.commands.options import Device, Positional


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate(cli.Command):
    """Measure configurations of a supernet on the test images, each with batch-norm statistics of its own."""

    supernet: Positional[Path]
    """folder that train wrote"""
    configs: tuple[Path, ...] = ()
    """JSON files of configurations"""
    uniform: tuple[int, ...] = ()
    """uniform widths; with neither, all that the supernet has"""
    data: Path | None = None
    """data folder, for CIFAR and folders of pictures"""
    recalibration: int = 7000
    """training images behind the batch-norm statistics"""
    device: Device = "auto"
    """where to compute"""

    def run(self) -> Mapping[str, Any]:
        if self.recalibration < 1:
            raise InputError("--recalibration", found=self.recalibration, expected="1 or more")
        from papercore.report import Table

        from oneshot_mpq.bitconfig import BitConfig
        from oneshot_mpq.study import measure_config
        from oneshot_mpq.workflow import open_project

        named = {str(path): BitConfig.load(path) for path in self.configs}
        net, splits = open_project(self.supernet, self.data, device=self.device)
        for config in named.values():
            config.check(net)
        widths = self.uniform or (() if named else net.bits)
        named = {f"W{b}A{b}": BitConfig.uniform(net, b, b) for b in widths} | named
        rows = [
            (name, config.bitops_G, config.size_MiB, measure_config(net, config, splits, self.recalibration))
            for name, config in named.items()
        ]
        return {"measured": Table(net.name, ("bits", "BitOps (G)", "size (MiB)", "test top-1 (%)"), rows)}
