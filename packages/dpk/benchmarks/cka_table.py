"""CKA of 20 x 20 layers of two ResNet-20 on a batch of 256: this package and torch-cka, interleaved in one process.

python packages/dpk/benchmarks/cka_table.py [repetitions]       (torch-cka: the extra "benchmark")

Both ways run the two networks; their passes alone are timed too, so that the tables can be compared without them. The
values of both are compared with this package's in float64.
"""

import importlib.util
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr
from io import StringIO
from typing import Any

import torch
from dpk.cka_report import cka_matrix
from dpk.networks import create_model
from papercore.progress import track
from papercore.report import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

LAYERS, BATCH = 20, 256


def torch_cka(networks: list[nn.Module], layers: list[str], images: Tensor) -> Callable[[], Tensor] | None:
    """The peer as a call that gives its table, None where it is not installed."""
    if importlib.util.find_spec("torch_cka") is None:
        return None
    from torch_cka import CKA

    made: Any = CKA(
        *networks, model1_name="first", model2_name="second", model1_layers=layers, model2_layers=layers, device="cpu"
    )
    loader = DataLoader(TensorDataset(images, torch.zeros(len(images))), BATCH)

    @torch.no_grad()
    def run() -> Tensor:
        with warnings.catch_warnings(), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            made.compare(loader, loader)
        return made.export()["CKA"]

    return run


def main(repetitions: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    networks: list[nn.Module] = [create_model("resnet20", 10).eval() for _ in range(2)]
    # not the activations: one that works in place would give the peer something else
    layers = [name for name, module in networks[0].named_modules() if isinstance(module, nn.Conv2d)][:LAYERS]
    images = torch.randn(BATCH, 3, 32, 32)

    def ours() -> Tensor:
        return cka_matrix(networks[0], networks[1], [images], first_layers=layers, second_layers=layers).values

    @torch.no_grad()
    def passes() -> None:
        for network in networks:
            network(images)

    runs: dict[str, Callable[[], Any]] = {"the networks alone": passes, "dpk": ours}
    peer = torch_cka(networks, layers, images)
    if peer is not None:
        runs["torch-cka"] = peer
    times: dict[str, list[float]] = {name: [] for name in runs}
    values: dict[str, Any] = {}
    for repetition in track(range(-1, repetitions), "cka tables", repetitions + 1):
        for name in list(runs)[:: -1 if repetition % 2 else 1]:
            begun = time.perf_counter()
            values[name] = runs[name]()
            if repetition >= 0:
                times[name].append(time.perf_counter() - begun)
    for network in networks:
        network.double()
    images = images.double()
    exact = ours()
    median = {name: statistics.median(seconds) for name, seconds in times.items()}
    alone = median["the networks alone"]
    rows = [
        (
            name,
            seconds,
            seconds / median["dpk"],
            (seconds - alone) / (median["dpk"] - alone),
            None if values[name] is None else float((values[name] - exact).abs().max()),
        )
        for name, seconds in median.items()
    ]
    columns = ("", "seconds", "ratio", "ratio without the networks", "largest error to float64")
    print(Table(f"CKA of {len(layers)} x {len(layers)} layers, batch {BATCH}", columns, rows).to_terminal())
    if peer is None:
        print("torch-cka is not installed: it is left out")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
