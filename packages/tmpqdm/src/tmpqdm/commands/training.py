"""`tmpqdm train`."""

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from papercore import cli
from papercore.rundir import check_output_folder

from tmpqdm.commands.options import Device, Positional


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train(cli.Command):
    """Train a small UNet to try everything on: handwritten digits in two minutes, or CIFAR-10 on a GPU.

    Interrupted, it goes on where it stopped when it is called again. In several processes:
    torchrun --standalone --nproc-per-node 2 -m tmpqdm.cli train ...
    """

    network: Positional[Literal["digits", "cifar10"]] = "digits"
    """8x8 handwritten digits, or 32x32 pictures of CIFAR-10"""
    out: Path
    """folder for the network, in diffusers' form; its run/ holds log and checkpoint"""
    data: Path | None = None
    """folder with images/cifar10"""
    steps: int | None = None
    """optimiser steps; none: 1500 or 20000"""
    batch_size: int | None = None
    """pictures a step, over all processes; none: 96 or 128"""
    learning_rate: float | None = None
    """largest value of the schedule; none: 3e-3 or 4e-4"""
    channels: tuple[int, ...] = (96, 192, 192)
    """of the levels of the CIFAR-10 UNet"""
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """data type of the forward pass; none: no, or bf16 for CIFAR-10 on a GPU"""
    checkpoint_every: int | None = None
    """steps between two checkpoints; none: 250 or 1000"""
    seed: int = 0
    """of the first weights, the order of pictures and the noise"""
    device: Device = "auto"
    """where to compute"""
    resume: bool = True
    """go on with the run in --out; --no-resume starts anew"""

    def run(self) -> Mapping[str, Any]:
        check_output_folder(self.out)
        import torch

        from tmpqdm.train import CIFAR10, DIGITS, train_unet

        base = DIGITS if self.network == "digits" else CIFAR10
        on_gpu = self.device == "cuda" or (self.device == "auto" and torch.cuda.is_available())
        given = {name: getattr(self, name) for name in ("steps", "batch_size", "learning_rate", "checkpoint_every")}
        changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        changes["mixed_precision"] = self.mixed_precision or (base.mixed_precision if on_gpu else "no")
        config = dataclasses.replace(base, seed=self.seed, **changes)
        result = train_unet(
            self.out,
            self.network,
            config,
            data=self.data,
            channels=self.channels,
            device=self.device,
            resume=self.resume,
        )
        if not result.is_main:
            sys.exit(cli.DONE)  # one of several processes speaks
        parameters = sum(p.numel() for p in result.model.parameters())
        return {"model": self.out, "parameters": parameters, "loss": result.loss, "seconds": result.seconds}
