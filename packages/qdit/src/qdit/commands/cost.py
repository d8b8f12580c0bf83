"""Commands about size and speed."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from papercore import cli
from papercore.errors import InputError, located
from papercore.rundir import check_output_file

from qdit.commands.options import Positional


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate(cli.Command):
    """Size and cost of a setting, from a model's config.json alone."""

    model: Positional[Path]
    """folder of a DiT, or its config.json; weights are not needed"""
    wbits: int = 4
    """bits of a weight"""
    abits: int = 8
    """bits of an activation"""
    group_size: int | Literal["row"] = 128
    """input channels a group; row: one group"""
    group_sizes: Path | None = None
    """JSON plan, instead of --group-size"""
    w_sym: bool = False
    """symmetric weights"""
    adaln_bits: int | None = None
    """bits of the adaLN weights; None leaves them alone"""
    rest_bits: int = 16
    """bits of every parameter that is not quantised"""

    def run(self) -> Mapping[str, Any]:
        from qdit.config import QDiTConfig, read_plan
        from qdit.estimate import as_result, model_cost

        if self.rest_bits not in (16, 32):
            raise InputError("--rest-bits", found=self.rest_bits, expected="16 or 32")
        sizes: Any = None if self.group_size == "row" else self.group_size
        if self.group_sizes is not None:
            sizes = read_plan(self.group_sizes)[0]
        with located(self.group_sizes or "qdit estimate"):
            config = QDiTConfig(self.wbits, self.abits, sizes, w_sym=self.w_sym, gptq=False, adaln_bits=self.adaln_bits)
            return as_result(model_cost(self.model, config, rest_bits=self.rest_bits))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Benchmark(cli.Command):
    """Time quantised linear layers against float32 ones, and against torchao where it is installed.

    Ratios are times divided by that of float32: below 1 is faster. Everything is measured in one run in alternating
    order; a line that is slower than float32 is marked as losing.
    """

    shapes: tuple[str, ...] = ("3456x1152", "1152x1152", "4608x1152", "1152x4608")
    """layers as rows x columns; the default are those of DiT-XL/2"""
    tokens: int = 256
    """rows of the activation"""
    groups: tuple[int, ...] = (32, 128, 288)
    """group sizes of the integer products; whole rows are always measured"""
    wbits: int = 8
    """bits of a weight, 2 to 8"""
    threads: int = 1
    """threads a product may use"""
    repeats: int = 15
    """timings of each line; the median is shown"""
    out: Path | None = None
    """JSON file for every single timing, the versions and the processor's features"""

    def run(self) -> Mapping[str, Any]:
        if self.out is not None:
            check_output_file(self.out)
        from qdit.benchmark import benchmark, parse_shape

        shapes = [parse_shape(shape) for shape in self.shapes]
        return benchmark(
            shapes, self.tokens, self.groups, self.wbits, threads=self.threads, repeats=self.repeats, out=self.out
        )
