"""Show how the bit-widths of a supernet disturb one another."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from papercore import cli
from papercore.errors import InputError
from papercore.rundir import check_output_folder

from oneshot_mpq.commands.options import DataName, Device, Positional, parse_bits


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inspect(cli.Command):
    """Measure and plot the interference of bit-widths, with and without the two remedies.

    Given folders of supernets trained with --watch it compares those; given none it trains the same network four
    times (neither remedy, the scheduler, the mitigation, both) in --out. Interrupted, it goes on where it stopped.
    """

    supernets: Positional[tuple[Path, ...]] = ()
    """folders that train --watch wrote"""
    out: Path
    """folder for inspection.html, .md, .json, and for the trainings"""
    dataset: DataName = "digits"
    """see train"""
    data: Path | None = None
    """see train"""
    model: str | None = None
    """see train"""
    float_epochs: int | None = None
    """see train"""
    bits: str = "2,3,4,5,6"
    """candidates"""
    epochs: int | None = None
    """of each supernet; none: 40, for a folder 150"""
    seed: int = 0
    """of everything random"""
    device: Device = "auto"
    """where to compute"""
    resume: bool = True
    """go on with the trainings in --out; --no-resume starts anew"""

    def run(self) -> Mapping[str, Any]:
        check_output_folder(self.out)
        if not self.supernets and self.dataset != "digits" and self.data is None:
            raise InputError("--data", found="nothing", expected=f"the folder that holds {self.dataset}")
        from oneshot_mpq.inspection import read_inspected, train_remedies, write_inspection
        from oneshot_mpq.workflow import Project

        if self.supernets:
            found = [read_inspected(folder) for folder in self.supernets]
        else:
            model = self.model or {"digits": "digits", "folder": "resnet18"}.get(self.dataset, "cifar-resnet20")
            project = Project(
                model,
                self.dataset,
                self.data,
                bits=parse_bits(self.bits),
                float_epochs=self.float_epochs,
                seed=self.seed,
            )
            changes = {} if self.epochs is None else {"epochs": self.epochs}
            found = train_remedies(project, self.out, device=self.device, resume=self.resume, **changes)
        comparison, *layers = write_inspection(found, self.out)
        return {"comparison": comparison, **{t.title: t for t in layers}, "report": self.out / "inspection.html"}
