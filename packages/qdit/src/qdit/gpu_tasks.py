"""qdit's work for the GPU queue."""

from collections.abc import Mapping
from typing import Any

import torch
from papercore.gpu import Request, Task
from papercore.gpu_checks import milliseconds

from qdit.layers import LayerSpec, QuantLinear


def tasks() -> list[Task]:
    return [
        Task("check-layer", "check", 95, 0.5, check_layer),
        Task("benchmark-simulation", "benchmark", 60, 2.0, benchmark_simulation),
    ]


def _layer(rows: int, columns: int, group: int, wbits: int, device: str) -> tuple[QuantLinear, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows + columns + group)
    weight = torch.randn(rows, columns, generator=generator) * torch.randn(columns, generator=generator).exp()
    spec = LayerSpec(wbits, 8, group, False, False, "dynamic", "token", "float16")
    layer = QuantLinear(rows, columns, bias=True, spec=spec)
    layer.round_to_nearest(weight)
    return layer.to(device), weight.to(device)


def check_layer(request: Request) -> Mapping[str, Any]:
    """The quantised layer on the device against the CPU: same stored bits, float32 outputs within 1e-5."""
    worst = 0.0
    for rows, columns, group in (
        ((96, 100, 32), (192, 64, 64)) if request.tiny else ((3456, 1152, 128), (1152, 4608, 96))
    ):
        for wbits in (4, 8):
            here, _ = _layer(rows, columns, group, wbits, "cpu")
            there, _ = _layer(rows, columns, group, wbits, request.device)
            x = torch.randn(64, columns, generator=torch.Generator().manual_seed(1))
            expected, found = here(x).double(), there(x.to(request.device)).cpu().double()
            error = float((found - expected).norm() / expected.norm())
            worst = max(worst, error)
            there.backend = "integer"
            exact = there(x.to(request.device)).cpu().double()
            worst = max(worst, float((exact - expected).norm() / expected.norm()))
    if not worst < 1e-5:
        raise AssertionError(f"relative error {worst} against the CPU")
    return {"worst relative error": worst}


def benchmark_simulation(request: Request) -> Mapping[str, Any]:
    """Milliseconds of the simulated layer against a bfloat16 linear layer, the four shapes of DiT-XL/2."""
    shapes = ((96, 64), (64, 96)) if request.tiny else ((3456, 1152), (1152, 1152), (4608, 1152), (1152, 4608))
    dtype = torch.float32 if request.device == "cpu" else torch.bfloat16
    results = []
    for tokens in (32,) if request.tiny else (256, 4096, 12800):
        for rows, columns in shapes:
            layer, weight = _layer(rows, columns, 32 if request.tiny else 128, 4, request.device)
            x = torch.randn(tokens, columns, device=request.device, dtype=dtype)
            dense = weight.to(dtype)
            plain = milliseconds(lambda x=x, dense=dense: x @ dense.T, request.device)
            simulated = milliseconds(lambda x=x, layer=layer: layer(x), request.device)
            results.append(
                {"tokens": tokens, "rows": rows, "columns": columns, "linear": plain, "simulated": simulated}
            )
    return {"dtype": str(dtype), "milliseconds": results}
