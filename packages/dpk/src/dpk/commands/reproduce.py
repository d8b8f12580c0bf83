"""`dpk reproduce`."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from papercore import cli
from papercore.rundir import check_output_folder

from dpk.commands.options import Device, say


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reproduce(cli.Command):
    """Re-test the paper's claims and write a report."""

    scale: Literal["tiny", "small", "full"] = "tiny"
    """tiny: two CPU cores, two minutes, embedded data; small: CIFAR-10 on one GPU, with --data; full: only described"""
    out: Path = Path("report")
    """folder for report.html, report.md, claims.json and the trained networks"""
    data: Path | None = None
    """folder with CIFAR-10 and its trained ResNets, for small"""
    seed: int = 0
    """of everything random; three seeds are taken from here on"""
    device: Device = "auto"
    """where to compute, for small"""

    def run(self) -> Mapping[str, Any]:
        from papercore.reproduce import Settings, reproduce

        from dpk.reproduce import PAPER

        check_output_folder(self.out)
        claims = reproduce([PAPER], Settings(self.scale, self.out, self.data, self.device, self.seed, say))
        return {"claims": claims, "report": self.out / "report.html"}
