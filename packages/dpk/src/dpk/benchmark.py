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
    "fitnet, two stages": lambda: FitNet(stages=2),
    "dpk, two stages": lambda: DPK(stages=2),
    "fitnet": lambda: FitNet(stages="all"),
    "dpk": lambda: DPK(stages="all"),
    "reviewkd": ReviewKD,
}
"""two stages are DPK's default; ReviewKD needs all"""


def benchmark_steps(
    teacher: str, student: str, batch_size: int, repetitions: int, *, device: str = "auto", seed: int = 0
) -> dict[str, Any]:
    """Medians of forward, backward and optimiser step, and ratios to FitNet on the same stages and to ReviewKD.

    Extra memory is the peak above that of cross-entropy alone.

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
        own = sum(p.numel() * p.element_size() for p in distiller.method.parameters())
        memory[name] = _memory(steps[name], device) + 2 * own  # and their momentum; gradients are in the step
    times: dict[str, list[float]] = {name: [] for name in steps}
    for repetition in range(repetitions + 2):
        # in an order that turns, so that a busy moment of the machine falls on all
        for name in list(steps)[:: -1 if repetition % 2 else 1]:
            begun = _now(device)
            steps[name]()
            if repetition >= 2:
                times[name].append(_now(device) - begun)
    median = {name: statistics.median(values) for name, values in times.items()}
    extra = {name: memory[name] - memory["ce"] for name in memory}
    rows = []
    for name in steps:
        taps = "fitnet, two stages" if name.endswith("two stages") else "fitnet"  # on the same stages
        rows.append(
            (
                name,
                1e3 * median[name],
                median[name] / median[taps],
                median[name] / median["reviewkd"],
                extra[name] / 2**20,
                extra[name] / extra["reviewkd"] if extra["reviewkd"] > 0 else None,
            )
        )
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


def _memory(step: Callable[[], None], device: str) -> float:
    """Bytes of tensors at the worst moment of a step above those before it.

    On a GPU from the allocator's counters; on a CPU torch's profiler records every allocation.
    """
    step()  # the optimiser's state is made
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return float(torch.cuda.max_memory_allocated() - before)
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    results: Any = profiled.profiler
    changes = [(e.start_ns(), e.nbytes()) for e in results.kineto_results.events() if e.name() == "[memory]"]
    held = worst = 0
    for _, size in sorted(changes, key=lambda change: change[0]):
        held += size
        worst = max(worst, held)
    return float(worst)


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
