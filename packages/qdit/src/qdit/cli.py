"""The `qdit` command."""

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from papercore import cli
from papercore.errors import InputError
from papercore.rundir import check_output_folder

from qdit.commands.cost import Benchmark, Estimate
from qdit.commands.models import Import, Train
from qdit.commands.options import Device, say
from qdit.commands.pictures import Evaluate, Report, Sample
from qdit.commands.quantising import Calibrate, Quantize, Search


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reproduce(cli.Command):
    """Re-test the paper's claims and write a report."""

    scale: Literal["tiny", "small", "full"] = "tiny"
    """tiny: two CPU cores, two minutes, embedded data; small: the CIFAR-10 DiT on one GPU, with --data"""
    out: Path = Path("report")
    """folder for report.html, report.md and claims.json"""
    data: Path | None = None
    """folder with the CIFAR-10 DiT, ResNet-56 and pictures, for small"""
    seed: int = 0
    """of everything random"""
    device: Device = "auto"
    """where to compute"""

    def run(self) -> Mapping[str, Any]:
        from papercore.reproduce import Settings, reproduce

        from qdit.reproduce import PAPER

        if self.scale not in PAPER.scales:
            raise InputError("--scale", found=self.scale, expected=" or ".join(PAPER.scales))
        check_output_folder(self.out)
        claims = reproduce([PAPER], Settings(self.scale, self.out, self.data, self.device, self.seed, say))
        return {"claims": claims, "report": self.out / "report.html"}


COMMANDS: dict[str, type[cli.Command]] = {
    "train": Train,
    "import": Import,
    "calibrate": Calibrate,
    "search": Search,
    "quantize": Quantize,
    "sample": Sample,
    "evaluate": Evaluate,
    "estimate": Estimate,
    "report": Report,
    "benchmark": Benchmark,
    "reproduce": Reproduce,
}


def main() -> int:
    return cli.main("qdit", COMMANDS, "Quantises diffusion transformers after training (Q-DiT).")


if __name__ == "__main__":
    sys.exit(main())
