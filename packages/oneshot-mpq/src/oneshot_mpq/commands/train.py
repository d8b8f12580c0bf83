"""Train a supernet."""

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from papercore import cli
from papercore.errors import InputError
from papercore.rundir import check_output_folder

from oneshot_mpq.commands.options import DataName, Device, parse_bits, parse_fixed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train(cli.Command):
    """Train a network once for all bit-widths.

    Interrupted, it goes on where it stopped when it is called again. In several processes:
    torchrun --standalone --nproc-per-node 2 -m oneshot_mpq.cli train ...
    """

    out: Path
    """folder for the supernet; its float/ and run/ hold logs and checkpoints"""
    dataset: DataName = "digits"
    """digits (embedded), cifar10 or cifar100 (mosaics in --data), folder (--data/train/CLASS/* and val/CLASS/*)"""
    data: Path | None = None
    """data folder; for CIFAR-10 it may hold trained ResNets"""
    model: str | None = None
    """digits, cifar-resnet20 (8, 32, 44, 56, 110) or a model of timm; none: the data set's (resnet18 for a folder)"""
    weights: Path | None = None
    """safetensors file of the float model"""
    float_epochs: int | None = None
    """epochs of float training before; none: 25 on digits, 5 on CIFAR, 0 on a folder"""
    bits: str = "2,3,4,5,6"
    """candidates, 2..8 or 32, separated by commas"""
    fixed: str | None = None
    """layers that are not searched, as NAME=8/8;OTHER=8/none with patterns; none: the first and the last"""
    per_channel: bool = False
    """a weight step for every output channel"""
    size: int = 224
    """height and width of the pictures of a folder"""
    epochs: int | None = None
    """of the supernet; none: 40, for a folder 150"""
    batch_size: int | None = None
    """images a step, over all processes; none: 64 on digits, 256 on CIFAR, 128 on a folder"""
    learning_rate: float | None = None
    """largest rate of the weights; none: 0.04"""
    step_learning_rate: float | None = None
    """largest rate of the steps; none: 1e-3 on digits, 1e-4 on CIFAR, 1e-5 on a folder"""
    paths: int = 3
    """random passes of a step, beside the one at the most bits"""
    idm: float = 0.01
    """weight of the information distortion; 0: off"""
    scheduler: bool = True
    """freeze and thaw the lowest bit of turbulent layers"""
    label_smoothing: float = 0.0
    """in the cross entropy"""
    accumulate: int = 1
    """micro-batches a step"""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """data type of the forward pass"""
    watch: bool = False
    """log the accuracy of every uniform width on the search images after every epoch"""
    checkpoint_every: int = 200
    """steps between two checkpoints"""
    log_every: int = 50
    """steps between two lines of the log"""
    seed: int = 0
    """of the split, the first weights, the order of images and the paths"""
    device: Device = "auto"
    """where to compute"""
    resume: bool = True
    """go on with the run in --out; --no-resume starts anew"""

    def run(self) -> Mapping[str, Any]:
        check_output_folder(self.out)
        if self.dataset != "digits" and self.data is None:
            raise InputError("--data", found="nothing", expected=f"the folder that holds {self.dataset}")
        if self.float_epochs is not None and self.float_epochs < 0:
            raise InputError("--float-epochs", found=self.float_epochs, expected="at least 0")
        bits = parse_bits(self.bits)
        fixed = None if self.fixed is None else parse_fixed(self.fixed)
        from papercore.report import Table

        from oneshot_mpq.bitconfig import BitConfig
        from oneshot_mpq.workflow import Project, train_supernet

        model = self.model or {"digits": "digits", "folder": "resnet18"}.get(self.dataset, "cifar-resnet20")
        project = Project(
            model,
            self.dataset,
            self.data,
            self.weights,
            bits,
            fixed,
            self.per_channel,
            self.float_epochs,
            self.size,
            self.seed,
        )
        changes = {
            name: getattr(self, name)
            for name in ("epochs", "batch_size", "learning_rate", "step_learning_rate")
            if getattr(self, name) is not None
        }
        same = ("paths", "idm", "scheduler", "label_smoothing", "accumulate", "mixed_precision", "checkpoint_every")
        changes |= {name: getattr(self, name) for name in (*same, "log_every")}
        config = project.train_config(**changes)
        result, _ = train_supernet(project, config, self.out, device=self.device, resume=self.resume, watch=self.watch)
        if not result.is_main:
            sys.exit(cli.DONE)  # one of several processes speaks
        net = result.net
        rows = []
        for b in net.bits:
            if all(b in layer.weight_choices for layer in net.layers.values()):
                config_b = BitConfig.uniform(net, b, b)
                rows.append((f"W{b}A{b}", config_b.bitops_G, config_b.size_MiB))
        return {
            "supernet": self.out,
            "searchable layers": len(net.layers),
            "loss": result.loss,
            "steps": result.steps,
            "seconds": result.seconds,
            "uniform widths": Table("cost of uniform widths", ("bits", "BitOps (G)", "size (MiB)"), rows),
        }
