"""`prance benchmark`: speed against timm's DeiT-S and a ToMe-style DeiT-S."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from papercore import cli
from papercore.errors import InputError
from papercore.rundir import check_output_file


@dataclasses.dataclass(frozen=True, kw_only=True)
class Benchmark(cli.Command):
    """Time our paths, timm's DeiT-S and a ToMe-style DeiT-S in one run, random weights.

    Ratios are how many times faster a way is than DeiT-S; all ways take turns. On a CPU, processor time is measured.
    """

    batch: int = 8
    """images at once"""
    repeats: int = 7
    """timings of every way; the median is shown"""
    threads: int = 1
    """threads a product may use on the CPU"""
    quick: bool = False
    """two timings of every way"""
    device: Literal["auto", "cpu", "cuda"] = "cpu"
    """where to compute"""
    out: Path | None = None
    """JSON file for every single timing, the versions and the machine"""

    def run(self) -> Mapping[str, Any]:
        import torch

        from prance.benchmark import Sizes, benchmark

        if self.out is not None:
            check_output_file(self.out)
        if self.device == "cuda" and not torch.cuda.is_available():
            raise InputError("--device", found="cuda", expected="a CUDA GPU in this machine")
        device = ("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device
        sizes = Sizes(self.batch, 2 if self.quick else self.repeats)
        return benchmark(sizes, device=device, thread_count=self.threads, out=self.out)
