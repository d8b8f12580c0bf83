"""The `tmpqdm` command."""

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from papercore import cli
from papercore.errors import InputError
from papercore.rundir import check_output_folder

from tmpqdm.commands.options import Device
from tmpqdm.commands.plans import Evaluate, Sample
from tmpqdm.commands.searching import Groups, Report, Search
from tmpqdm.commands.solver import Calibrate, Export, say
from tmpqdm.commands.training import Train


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reproduce(cli.Command):
    """Re-test the paper's claims and write a report."""

    scale: Literal["tiny", "small", "full"] = "tiny"
    """tiny: two CPU cores, two minutes, embedded data; small: CIFAR-10 on one GPU, with --data"""
    out: Path = Path("report")
    """folder for report.html, report.md and claims.json"""
    data: Path | None = None
    """folder with images/cifar10 and the trained ResNet-56, for small"""
    seed: int = 0
    """of everything random"""
    device: Device = "auto"
    """where to compute"""

    def run(self) -> Mapping[str, Any]:
        from papercore.reproduce import Settings, reproduce

        from tmpqdm.reproduce import PAPER

        if self.scale not in PAPER.scales:
            raise InputError("--scale", found=self.scale, expected=" or ".join(PAPER.scales))
        check_output_folder(self.out)
        claims = reproduce([PAPER], Settings(self.scale, self.out, self.data, self.device, self.seed, say))
        return {"claims": claims, "report": self.out / "report.html"}


COMMANDS: dict[str, type[cli.Command]] = {
    "train": Train,
    "groups": Groups,
    "calibrate": Calibrate,
    "search": Search,
    "evaluate": Evaluate,
    "sample": Sample,
    "report": Report,
    "export": Export,
    "reproduce": Reproduce,
}


def main() -> int:
    return cli.main("tmpqdm", COMMANDS, "Searches timesteps and bits of diffusion models together (TMPQ-DM).")


if __name__ == "__main__":
    sys.exit(main())
