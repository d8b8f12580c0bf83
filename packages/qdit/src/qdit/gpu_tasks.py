"""qdit's work for the GPU queue."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from papercore.gpu import Request, Task
from papercore.gpu_checks import milliseconds
from papercore.kernels import group_linear, pack_weight, prepare_weight, quantize_rows
from papercore.quant import group_quantize

from qdit.benchmark import torchao_layer
from qdit.layers import LayerSpec, QuantLinear


def tasks() -> list[Task]:
    return [
        Task("check-layer", "check", 95, 0.5, check_layer),
        Task("benchmark-linear", "benchmark", 70, 5.0, benchmark_linear),
        Task("benchmark-simulation", "benchmark", 60, 2.0, benchmark_simulation),
        Task(
            "reproduce-small",
            "reproduction",
            80,
            10.0,
            reproduce_small,
            requires=("diffusers", "optuna"),
            needs_data=True,
        ),
    ]


def reproduce_small(request: Request) -> Mapping[str, Any]:
    """The claims at small scale; the data folder has the CIFAR-10 DiT, the ResNet and the test pictures."""
    import tempfile
    from pathlib import Path

    from papercore.reproduce import Settings

    from qdit import small

    with tempfile.TemporaryDirectory() as folder:
        settings = Settings("small", Path(folder), request.data, request.device, 0, lambda text: None)
        result = small.run(settings, small.TINY if request.tiny else small.FULL)
    return {
        "claims": [dataclasses.asdict(claim) for claim in result.claims],
        "tables": {table.title: table.records() for table in result.tables},
        "text": result.text,
    }


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


def benchmark_linear(request: Request) -> Mapping[str, Any]:
    """Milliseconds of the four linear shapes of DiT-XL/2 in every way; ours include the activation's quantisation.

    What the device or its libraries cannot do (float8, torchao) is recorded with the reason.
    """
    device = request.device
    shapes = ((96, 64), (64, 96)) if request.tiny else ((3456, 1152), (1152, 1152), (4608, 1152), (1152, 4608))
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    results = []
    for tokens in (32,) if request.tiny else (256, 4096, 12800):
        for rows, columns in shapes:
            x = torch.randn(tokens, columns, device=device, dtype=dtype)
            w = torch.randn(rows, columns, device=device)
            dense, bias = w.to(dtype), torch.zeros(rows, device=device)
            a, b = (torch.randint(-128, 128, v.shape, device=device).to(torch.int8) for v in (x, w))
            layer, _ = _layer(rows, columns, 32 if request.tiny else 128, 8, device)
            ways: dict[str, Callable[[], Any]] = {
                "dense": lambda x=x, dense=dense: x @ dense.T,
                "int8 product alone": lambda a=a, b=b: torch._int_mm(a, b.T),  # pyright: ignore[reportPrivateImportUsage]
                "simulation, groups of 128": lambda x=x, layer=layer: layer(x),
            }
            for size in (16, 32, None) if request.tiny else (32, 128, 288, None):
                for bits in (8, 4):
                    weight: Any = prepare_weight(*group_quantize(w, bits, size), size, bits=bits)
                    if bits == 4:
                        weight = pack_weight(weight)

                    def ours(x=x, weight=weight, size=size, bias=bias) -> torch.Tensor:
                        return group_linear(quantize_rows(x, 8, size), weight, bias)

                    ways[f"W{bits}A8, {'row-wise' if size is None else f'groups of {size}'}"] = ours
            times: dict[str, Any] = {name: milliseconds(work, device) for name, work in ways.items()}
            times |= {"torchao int8 dynamic": _peer(x, w, device), "float8 row-wise": _float8(x, w, device)}
            results.append({"tokens": tokens, "rows": rows, "columns": columns, "milliseconds": times})
    return {"dtype": str(dtype), "results": results}


def _peer(x: torch.Tensor, w: torch.Tensor, device: str) -> float | str:
    try:
        peer = torchao_layer(w.to(x.dtype), torch.zeros(len(w), device=device, dtype=x.dtype))
        return "not installed" if peer is None else milliseconds(lambda: peer(x), device)
    except (RuntimeError, NotImplementedError, ImportError) as error:
        return str(error).splitlines()[0]


def _float8(x: torch.Tensor, w: torch.Tensor, device: str) -> float | str:
    """`torch._scaled_mm` with a scale for every row of both, activations converted inside the timing."""
    if device == "cpu":
        return "not on a CPU"

    def rows_of(v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scale = v.float().abs().amax(1, keepdim=True).clamp(min=1e-12) / 448
        return (v.float() / scale).to(torch.float8_e4m3fn), scale

    try:
        b, sb = rows_of(w)

        def work() -> torch.Tensor:
            a, sa = rows_of(x)
            return torch._scaled_mm(a, b.T, scale_a=sa, scale_b=sb.T, out_dtype=torch.bfloat16)

        return milliseconds(work, device)
    except RuntimeError as error:
        return str(error).splitlines()[0]
