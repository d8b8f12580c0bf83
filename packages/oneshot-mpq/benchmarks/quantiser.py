"""The fake quantiser, forward and backward, against the eager formula and the peers, interleaved in one process.

    python benchmarks/quantiser.py [--elements 589824 1638400] [--repetitions 15] [--threads 1] [--json FILE]

Medians. The floor of what memory allows is a forward that writes what it reads, and a backward alike: "two clones" into
fresh memory, as every way here must, "two copies" into memory that is there.
"""

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from oneshot_mpq import lsq_fake_quantize


def eager(x: torch.Tensor, step: torch.Tensor, low: int, high: int, scale: float) -> torch.Tensor:
    """The formula of the LSQ paper with its straight-through pieces, operation by operation, on autograd."""
    s = (step - step * scale).detach() + step * scale
    v = torch.clamp(x / s, low, high)
    return ((v.round() - v).detach() + v) * s


def torch_learnable(x: torch.Tensor, step: torch.Tensor, low: int, high: int, scale: float) -> torch.Tensor:
    zero = torch.zeros(1)
    return torch._fake_quantize_learnable_per_tensor_affine(x, step.reshape(1), zero, low, high, scale)


def ways(elements: int) -> dict[str, Callable[[], None]]:
    x = torch.randn(elements, requires_grad=True)
    upstream, step = torch.randn(elements), torch.tensor(0.4, requires_grad=True)
    low, high = -8, 7
    first, second = torch.empty(elements), torch.empty(elements)

    def of(function: Callable[..., torch.Tensor]) -> Callable[[], None]:
        def run() -> None:
            x.grad = step.grad = None
            function(x, step, low, high, 1.0).backward(upstream)

        return run

    def copies() -> None:
        first.copy_(x.detach())
        second.copy_(upstream)

    def clones() -> None:
        x.detach().clone()
        upstream.clone()

    found = {
        "ours": of(lsq_fake_quantize),
        "eager formula": of(eager),
        "torch learnable": of(torch_learnable),
        "two clones": clones,
        "two copies": copies,
    }
    if importlib.util.find_spec("brevitas"):
        from brevitas.nn import QuantIdentity
        from brevitas.quant import Int8ActPerTensorFloat

        layer = QuantIdentity(Int8ActPerTensorFloat, bit_width=4)
        layer(x.detach())

        def brevitas() -> None:
            x.grad = None
            layer(x).backward(upstream)

        found["brevitas QuantIdentity"] = brevitas
    return found


def measure(elements: int, repetitions: int) -> dict[str, float]:
    """Median milliseconds by way."""
    times: dict[str, list[float]] = {}
    candidates = ways(elements)
    for repetition in range(repetitions + 2):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            if repetition >= 2:
                times.setdefault(name, []).append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, nargs="+", default=[65536, 589824, 1638400])
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = []
    for elements in options.elements:
        found = measure(elements, options.repetitions)
        ratios = {f"{name} / ours": value / found["ours"] for name, value in found.items() if name != "ours"}
        ratios["ours / two copies"] = found["ours"] / found["two copies"]
        results.append({"elements": elements, "milliseconds": found, "ratios": ratios})
        print(f"{elements} elements, float32, {options.threads} thread(s)")
        for name, value in found.items():
            print(f"  {name:24s} {value:9.3f} ms   {value / found['ours']:6.2f} x ours")
    if importlib.util.find_spec("brevitas") is None:
        print("brevitas is not installed: left out")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
