"""Speed of the parts against the obvious ways and the peers."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from papercore import cli
from papercore.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Benchmark(cli.Command):
    """Time the fake quantiser, the turbulence metric and the batch-norm bank against the obvious ways and the peers.

    Everything runs in alternating order in one process; a ratio above 1 says that ours is faster.
    """

    elements: tuple[int, ...] = (65_536, 589_824, 1_638_400)
    """sizes of the tensor that is quantised"""
    threads: int = 1
    """that torch may use"""
    repeats: int = 15
    """timings of each line; the median is shown"""
    device: Literal["cpu", "cuda"] = "cpu"
    """of the quantiser"""

    def run(self) -> Mapping[str, Any]:
        if not self.elements or min(*self.elements, self.threads, self.repeats) < 1:
            raise InputError("--elements, --threads, --repeats", found="0 or less", expected="at least 1 each")
        import torch

        from oneshot_mpq.benchmark import benchmark

        if self.device == "cuda" and not torch.cuda.is_available():
            raise InputError("--device", found="cuda", expected="a CUDA GPU in this machine")
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            return benchmark(self.elements, self.repeats, self.device)
        finally:
            torch.set_num_threads(before)
