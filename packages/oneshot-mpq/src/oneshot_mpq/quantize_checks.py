"""The fake quantiser's work for the GPU queue."""

from collections.abc import Mapping
from typing import Any

import torch
from papercore.gpu import Request, Task
from papercore.gpu_checks import milliseconds

from oneshot_mpq.benchmark import quantiser_ways
from oneshot_mpq.lsq import code_range
from oneshot_mpq.quantize import lsq_fake_quantize


def gpu_checks() -> list[Task]:
    return [
        Task("check-quantiser", "check", 96, 0.5, check_quantiser),
        Task("benchmark-quantiser", "benchmark", 75, 1.0, benchmark_quantiser),
    ]


def check_quantiser(request: Request) -> Mapping[str, Any]:
    """On the device against the CPU: outputs and input gradients equal, the step's gradient within 1e-5."""
    worst = 0.0
    for bits in (2, 4, 8):
        for signed in (True, False):
            low, high = code_range(bits, signed)
            x = torch.randn(1000 if request.tiny else 3_000_001, generator=torch.Generator().manual_seed(bits))
            x[:3] = torch.tensor([low * 0.25, high * 0.25, 0.125])
            found = []
            for device in ("cpu", request.device):
                a = x.to(device, copy=True).requires_grad_()
                step = torch.tensor(0.25, device=device, requires_grad=True)
                y = lsq_fake_quantize(a, step, low, high)
                y.backward(a.detach().abs())
                assert a.grad is not None and step.grad is not None
                found.append((y.detach().cpu(), a.grad.cpu(), float(step.grad)))
            (y0, g0, s0), (y1, g1, s1) = found
            if not (torch.equal(y0, y1) and torch.equal(g0, g1)):
                raise AssertionError(f"{bits} bits, signed {signed}: outputs or gradients differ from the CPU's")
            worst = max(worst, abs(s0 - s1) / abs(s0))
    if not worst < 1e-5:
        raise AssertionError(f"relative error of the step's gradient {worst}")
    return {"step gradient": worst}


def benchmark_quantiser(request: Request) -> Mapping[str, Any]:
    """Milliseconds by size; the largest is an activation of 256 x 64 x 56 x 56."""
    results = []
    for elements in (4096,) if request.tiny else (589_824, 6_422_528, 51_380_224):
        times = {n: milliseconds(work, request.device) for n, work in quantiser_ways(elements, request.device).items()}
        ratios = {name: value / times["ours"] for name, value in times.items()}
        results.append({"elements": elements, "milliseconds": times, "of ours": ratios})
    return {"results": results}
