"""Speed against the obvious ways and the peers, interleaved in one process; medians of milliseconds."""

import importlib.util
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from papercore.report import Table
from torch import Tensor, nn

from oneshot_mpq.batchnorm import BatchNormBank
from oneshot_mpq.layers import QuantLayer
from oneshot_mpq.quantize import lsq_fake_quantize
from oneshot_mpq.reference import slow_turbulence
from oneshot_mpq.turbulence import turbulence

Ways = Mapping[str, Callable[[], Any]]


def medians(ways: Ways, repeats: int, synchronise: Callable[[], None] = lambda: None) -> dict[str, float]:
    """Milliseconds of each, in alternating order, after two rounds that do not count."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats + 2):
        for name, work in ways.items():
            synchronise()
            start = time.perf_counter()
            work()
            synchronise()
            if repeat > 1:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def eager_formula(x: Tensor, step: Tensor, low: int, high: int, scale: float = 1.0) -> Tensor:
    """The formula of the LSQ paper with detached pieces, operation by operation, on autograd."""
    s = (step - step * scale).detach() + step * scale
    v = torch.clamp(x / s, low, high)
    return ((v.round() - v).detach() + v) * s


def torch_learnable(x: Tensor, step: Tensor, low: int, high: int, scale: float = 1.0) -> Tensor:
    """torch's own operator; its gradients are not LSQ's at the clip bounds."""
    zero = torch.zeros(1, device=x.device)
    learnable: Any = torch._fake_quantize_learnable_per_tensor_affine  # pyright: ignore[reportPrivateImportUsage]
    return learnable(x, step.reshape(1), zero, low, high, scale)


def quantiser_ways(elements: int, device: str = "cpu") -> Ways:
    """Forward and backward at 4 signed bits."""
    x = torch.randn(elements, device=device, requires_grad=True)
    upstream, step = torch.randn(elements, device=device), torch.tensor(0.4, device=device, requires_grad=True)
    first, second = torch.empty(elements, device=device), torch.empty(elements, device=device)

    def of(function: Callable[..., Tensor]) -> Callable[[], None]:
        def run() -> None:
            x.grad = step.grad = None
            function(x, step, -8, 7).backward(upstream)

        return run

    def clones() -> None:
        x.detach().clone()
        upstream.clone()

    def copies() -> None:
        first.copy_(x.detach())
        second.copy_(upstream)

    ways: dict[str, Callable[[], Any]] = {
        "ours": of(lsq_fake_quantize),
        "eager formula": of(eager_formula),
        "torch learnable": of(torch_learnable),
        "two copies into new memory": clones,
        "two copies into old memory": copies,
    }
    if importlib.util.find_spec("brevitas"):
        from brevitas.nn import QuantIdentity  # pyright: ignore[reportMissingImports]
        from brevitas.quant import Int8ActPerTensorFloat  # pyright: ignore[reportMissingImports]

        layer = QuantIdentity(Int8ActPerTensorFloat, bit_width=4).to(device)
        layer(x.detach())

        def brevitas() -> None:
            x.grad = None
            layer(x).backward(upstream)

        ways["brevitas QuantIdentity"] = brevitas
    return ways


def turbulence_ways(elements: int) -> Ways:
    """One layer of so many weights at 2 to 6 bits."""
    layer = QuantLayer(nn.Conv2d(elements // 9 // 64, 64, 3), (2, 3, 4, 5, 6), (2, 3, 4, 5, 6))
    return {"ours": lambda: turbulence(layer), "loop over the codes": lambda: slow_turbulence(layer)}


def bank_ways(channels: int, size: int) -> Ways:
    """A training pass through one of 25 batch norms, and the optimiser's and checkpoint's view of all of them."""
    norm, widths = nn.BatchNorm2d(channels), (2, 3, 4, 5, 6)
    bank = BatchNormBank(norm, widths, widths).train()
    modules = nn.ModuleDict({f"{w}/{a}": nn.BatchNorm2d(channels) for w in widths for a in widths}).train()
    x = torch.randn(32, channels, size, size, requires_grad=True)
    bank.select(4, 4)
    return {
        "ours": lambda: bank(x).sum().backward(),
        "25 modules": lambda: modules["4/4"](x).sum().backward(),
        "ours, state_dict": bank.state_dict,
        "25 modules, state_dict": modules.state_dict,
    }


def benchmark(elements: Sequence[int], repeats: int = 15, device: str = "cpu") -> dict[str, Any]:
    """Tables of milliseconds and of ratios to ours."""
    on_gpu = device != "cpu"
    tables: dict[str, Any] = {}
    for count in elements:
        found = medians(quantiser_ways(count, device), repeats, torch.cuda.synchronize if on_gpu else lambda: None)
        tables[f"quantiser {count}"] = _table(f"fake quantiser, forward and backward, {count} float32", found)
    found = medians(turbulence_ways(589_824), max(1, repeats // 5))
    tables["turbulence"] = _table("turbulence of 589824 weights", found)
    found = medians(bank_ways(64, 16), repeats)
    passes = {name: found[name] for name in ("ours", "25 modules")}
    states = {"ours": found["ours, state_dict"], "25 modules": found["25 modules, state_dict"]}
    tables["bank"] = _table("batch norm of 25 pairs, forward and backward, 32 x 64 x 16 x 16", passes)
    tables["bank state"] = _table("its state_dict", states)
    if not importlib.util.find_spec("brevitas"):
        tables["left out"] = "brevitas is not installed"
    return tables


def _table(title: str, found: Mapping[str, float]) -> Table:
    rows = [(name, value, value / found["ours"]) for name, value in found.items()]
    return Table(title, ("", "ms", "of ours"), rows)
