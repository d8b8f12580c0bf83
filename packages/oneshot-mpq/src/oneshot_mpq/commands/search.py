"""Find the bits of every layer under a budget."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from papercore import cli
from papercore.errors import InputError
from papercore.rundir import check_output_folder

from oneshot_mpq.commands.options import Device, Positional


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search(cli.Command):
    """Find the bits of every layer under a budget, without training.

    Every configuration found is measured on the test images with batch-norm statistics of its own.
    """

    supernet: Positional[Path]
    """folder that train wrote"""
    out: Path
    """folder for the configurations, one JSON file a budget"""
    data: Path | None = None
    """data folder, for CIFAR and folders of pictures"""
    budget: tuple[float, ...] = ()
    """budgets in the unit; none: what uniform widths of 3 and 4 bits cost"""
    unit: Literal["bitops_G", "size_MiB"] = "bitops_G"
    """1e9 bit operations a sample, or size of the weights"""
    method: Literal["greedy", "ilp", "evolution", "random"] = "greedy"
    """of the search"""
    objective: Literal["loss", "error"] = "loss"
    """what is minimised on the search images"""
    images: int = 2048
    """search images at most"""
    recalibration: int = 7000
    """training images behind the batch-norm statistics"""
    compat: Literal["none", "reference"] = "none"
    """reference: the greedy search of the original code, with its constants and defects"""
    evaluations: int = 1000
    """configurations that evolution and random measure"""
    storage: str | None = None
    """of the evolution: a file or a database URL of Optuna, from where it goes on"""
    shared: bool = False
    """other processes search in the same storage at the same time"""
    respect_frozen: bool = False
    """use only weight bits that the last scheduler event allows"""
    seed: int = 0
    """of the random searches"""
    device: Device = "auto"
    """where to compute"""

    def run(self) -> Mapping[str, Any]:
        check_output_folder(self.out)
        if self.images < 1 or self.recalibration < 1:
            raise InputError(
                "--images, --recalibration", found=min(self.images, self.recalibration), expected="1 or more"
            )
        from papercore.report import Table
        from papercore.rundir import write_json
        from torch.utils.data import DataLoader, Subset

        from oneshot_mpq.bitconfig import BitConfig
        from oneshot_mpq.search import search_front
        from oneshot_mpq.study import measure_config
        from oneshot_mpq.workflow import open_project

        net, splits = open_project(self.supernet, self.data, device=self.device)
        count = min(self.images, len(splits.search))  # pyright: ignore[reportArgumentType]
        loader = DataLoader(Subset(splits.search, range(count)), 256)
        budgets = self.budget or tuple(
            getattr(BitConfig.uniform(net, b, b), self.unit)
            for b in (3, 4)
            if all(b in layer.weight_choices for layer in net.layers.values())
        )
        front = search_front(
            net,
            loader,
            [{self.unit: budget} for budget in budgets],
            self.method,
            self.objective,
            compat=None if self.compat == "none" else self.compat,
            respect_frozen=self.respect_frozen,
            evaluations=self.evaluations,
            storage=self.storage,
            alone=not self.shared,
            seed=self.seed,
        )
        rows = []
        for budget, found in zip(budgets, front.results, strict=True):
            top1 = measure_config(net, found.config, splits, self.recalibration)
            config = dataclasses.replace(found.config, metrics={**found.config.metrics, "test_top1": top1})
            path = self.out / f"{self.unit}-{budget:.6g}.json"
            config.save(path)
            rows.append((budget, config.bitops_G, config.size_MiB, top1, found.evaluations, path.name))
        columns = (f"budget ({self.unit})", "BitOps (G)", "size (MiB)", "test top-1 (%)", "measured", "file")
        write_json(self.out / "log.json", {"measured": front.results[-1].log.records()})
        return {
            "found": Table(f"configurations of {net.name}", columns, rows),
            "front": front.table,
            "out": self.out,
        }
