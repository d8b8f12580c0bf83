"""Re-test the paper's claims."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from papercore import cli
from papercore.errors import InputError
from papercore.rundir import check_output_folder

from oneshot_mpq.commands.options import Device, say


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reproduce(cli.Command):
    """Re-test the paper's claims and write a report.

    Interrupted, it goes on where it stopped when it is called again.
    """

    scale: Literal["tiny", "small", "full"] = "tiny"
    """tiny: two CPU cores, two minutes, embedded data; small: CIFAR-10 with a ResNet-20 on one GPU, with --data;
    full: the paper's own setting, described in the report"""
    out: Path = Path("report")
    """folder for report.html, report.md and claims.json, and for the trained networks"""
    data: Path | None = None
    """folder with the CIFAR-10 pictures, for small"""
    seed: int = 0
    """the first of three"""
    device: Device = "auto"
    """where to compute; tiny always uses the CPU"""

    def run(self) -> Mapping[str, Any]:
        from papercore.reproduce import Settings, reproduce

        from oneshot_mpq.reproduce import FULL, PAPER

        if self.scale not in PAPER.scales:
            raise InputError("--scale", found=self.scale, expected=" or ".join(PAPER.scales), hint=FULL)
        check_output_folder(self.out)
        claims = reproduce([PAPER], Settings(self.scale, self.out, self.data, self.device, self.seed, say))
        return {"claims": claims, "report": self.out / "report.html"}
