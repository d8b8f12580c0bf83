"""How long a step of each method takes, and the memory it needs beside the networks; measured side by side."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from papercore.errors import InputError
from papercore.report import Table
from torch import nn

from dpk.distiller import Distiller
from dpk.dpk_method import DPK
from dpk.loading import load_network
from dpk.method import CrossEntropy, Method
from dpk.methods import FitNet, ReviewKD

METHODS: Mapping[str, Callable[[], Method]] = {
    "ce": CrossEntropy,
    "fitnet": lambda: FitNet(stages="all"),
    "reviewkd": ReviewKD,
    "dpk": lambda: DPK(stages="all"),
    "dpk, two stages": DPK,
}
"""on all stages, as ReviewKD needs them; DPK's default of two beside it"""


def benchmark_steps(
    teacher: str, student: str, batch_size: int, repetitions: int, *, device: str = "auto", seed: int = 0
) -> dict[str, Any]:
    """Medians of forward, backward and optimiser step, and ratios to FitNet and ReviewKD.

    Raises:
        InputError: no such network, or numbers below 1.
    """
    if batch_size < 4 or repetitions < 1:
        raise InputError("batch size, repetitions", found=(batch_size, repetitions), expected="at least 4 and 1")
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(batch_size, 3, 32, 32, generator=generator).to(device)
    labels = torch.randint(100, (batch_size,), generator=generator).to(device)
    steps: dict[str, Callable[[], None]] = {}
    memory: dict[str, float] = {}
    for name, make in METHODS.items():
        networks = [load_network(n, 100, None, seed + i).to(device) for i, n in enumerate((teacher, student))]
        distiller = Distiller(networks[1].train(), networks[0], make(), images[:2], seed=seed).to(device).train()
        steps[name] = _step(distiller, images, labels)
        memory[name] = _memory(steps[name], distiller, device)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for repetition in range(repetitions + 2):
        for name, step in steps.items():
            begun = _now(device)
            step()
            if repetition >= 2:
                times[name].append(_now(device) - begun)
    median = {name: statistics.median(values) for name, values in times.items()}
    extra = {name: memory[name] - memory["ce"] for name in memory}
    rows = [
        (
            name,
            1e3 * median[name],
            median[name] / median["fitnet"],
            median[name] / median["reviewkd"],
            extra[name] / 2**20,
            extra[name] / extra["reviewkd"] if extra["reviewkd"] > 0 else None,
        )
        for name in steps
    ]
    columns = ("method", "ms a step", "to FitNet", "to ReviewKD", "extra MiB", "memory to ReviewKD")
    title = f"{teacher} -> {student}, batch {batch_size}, {device}, {torch.get_num_threads()} threads"
    return {"steps": Table(title, columns, rows)}


def _step(distiller: Distiller, images: torch.Tensor, labels: torch.Tensor) -> Callable[[], None]:
    parameters = [p for p in distiller.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.01, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        distiller(images, labels).total.backward()
        nn.utils.clip_grad_norm_(parameters, 5.0)
        optimizer.step()

    return step


def _memory(step: Callable[[], None], distiller: Distiller, device: str) -> float:
    """Bytes at the peak of a step: allocated on a GPU; on a CPU what is kept for the backward pass, and parameters
    with gradients and momentum."""
    step()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        return float(torch.cuda.max_memory_allocated())
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    parameters = sum(p.numel() * p.element_size() for p in distiller.parameters() if p.requires_grad)
    return float(sum(kept.values()) + 3 * parameters)


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
