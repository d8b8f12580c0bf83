"""papercore's own work for the GPU queue: the quantisers there equal those on the CPU, and what they cost."""

from collections.abc import Mapping
from typing import Any

import torch

from papercore.gpu import Request, Task
from papercore.kernels import group_gemm, group_linear, pack_weight, prepare_weight, quantize_rows
from papercore.quant import fake_quantize, group_quantize


def tasks() -> list[Task]:
    return [
        Task("check-quantisers", "check", 100, 0.5, check_quantisers),
        Task("check-kernels", "check", 98, 1.0, check_kernels),
        Task("check-training", "check", 90, 1.0, check_training),
        Task("benchmark-fake-quantize", "benchmark", 40, 1.0, benchmark_fake_quantize),
    ]


def check_quantisers(request: Request) -> Mapping[str, Any]:
    """Codes, scales and zero points on the device against the CPU, bit for bit."""
    generator = torch.Generator().manual_seed(0)
    rows = 16 if request.tiny else 2048
    compared = differing = 0
    for bits in (2, 4, 6, 8):
        for symmetric in (False, True):
            for columns, group in ((96, 32), (100, 32), (97, None), (1152, 128)):
                x = torch.randn(rows, columns, generator=generator) * torch.randn(columns, generator=generator).exp()
                x[0] = 0
                here = group_quantize(x, bits, group, symmetric=symmetric)
                there = group_quantize(x.to(request.device), bits, group, symmetric=symmetric)
                for a, b in zip(here, there, strict=True):
                    compared += a.numel()
                    differing += int((a != b.cpu()).sum())
    if differing:
        raise AssertionError(f"{differing} of {compared} codes, scales and zero points differ from the CPU's")
    return {"compared": compared, "differing": differing}


def check_kernels(request: Request) -> Mapping[str, Any]:
    """Integer products on the device against the reference on the CPU, and the codes that they start from."""
    generator = torch.Generator().manual_seed(0)
    worst, differing, compared = 0.0, 0, 0
    shapes = ((5, 40, 96), (3, 7, 100)) if request.tiny else ((256, 3456, 1152), (1000, 1152, 4608), (1, 200, 1000))
    for tokens, rows, columns in shapes:
        x = torch.randn(tokens, columns, generator=generator) * torch.randn(columns, generator=generator).exp()
        w, bias = torch.randn(rows, columns, generator=generator), torch.randn(rows, generator=generator)
        for size in (32, 48, None) if request.tiny else (32, 96, 128, 288, None):
            for bits in (4, 8):
                codes, scale, zero = group_quantize(w, bits, size)
                # The product is compared on the device's own codes: one code apart is no error of the product.
                q = quantize_rows(x.to(request.device), 8, size)
                qx, sx, zx = (value.cpu() for value in q)
                expected = group_gemm(qx, sx, zx, codes, scale, zero, size, bias, backend="reference")
                assert isinstance(expected, torch.Tensor)
                signed = 128 if q.codes.dtype == torch.int8 else 0
                plain = group_quantize(x, 8, size)[0]
                differing += int((qx.to(torch.int16) + signed != plain).sum())
                compared += plain.numel()
                sent = codes.to(request.device), scale.to(request.device), zero.to(request.device)
                weights: list[Any] = [prepare_weight(*sent, size)]
                if bits == 4:
                    weights.append(pack_weight(prepare_weight(*sent, size, bits=4)))
                for weight in weights:
                    found = group_linear(q, weight, bias.to(request.device)).cpu()
                    worst = max(worst, float((found - expected).norm() / expected.norm()))
    if not worst < 1e-6 or differing > 1e-4 * compared:
        raise AssertionError(f"relative error {worst}; {differing} of {compared} codes differ")
    return {"worst relative error": worst, "codes compared": compared, "codes differing": differing}


def check_training(request: Request) -> Mapping[str, Any]:
    """The loop on the device, in every precision it has: the loss falls, and whether a second run gives equal bits."""
    import tempfile
    from pathlib import Path

    from papercore.data.digits import DigitsClassifier, digits
    from papercore.rundir import read_lines
    from papercore.training import TrainConfig, train

    data = torch.utils.data.TensorDataset(*digits("train"))
    found = {}
    for precision in ("no", "bf16") if request.device == "cpu" else ("no", "bf16", "fp16"):
        config = TrainConfig(
            steps=40 if request.tiny else 200, learning_rate=3e-3, log_every=10, mixed_precision=precision, ema=0.9
        )
        with tempfile.TemporaryDirectory() as folder:
            weights = []
            for name in ("once", "again"):
                torch.manual_seed(0)
                out = Path(folder) / name
                trained = train(DigitsClassifier(), data, _classify, config, out, device=request.device, label=name)
                weights.append(list(trained.model.state_dict().values()))
            first, last = read_lines(out / "log.jsonl")[0]["loss"], trained.loss
        same = all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
        found[precision] = {"first loss": first, "last loss": last, "equal bits again": same}
        if not last < 0.5 * first:
            raise AssertionError(f"{precision}: the loss went from {first} to {last}")
    return found


def _classify(model: torch.nn.Module, batch: Any, generator: torch.Generator) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])


def benchmark_fake_quantize(request: Request) -> Mapping[str, Any]:
    """Milliseconds of the plain fake quantiser, of the compiled one, and of a copy of the same bytes (the floor)."""
    tokens, columns = (64, 128) if request.tiny else (12800, 4608)
    x = torch.randn(tokens, columns, device=request.device, dtype=torch.bfloat16)
    compiled = torch.compile(fake_quantize) if request.device == "cuda" else fake_quantize
    rows = {}
    for group in (32, 128, None):
        rows[str(group)] = {
            "plain": milliseconds(lambda group=group: fake_quantize(x, 8, group), request.device),
            "compiled": milliseconds(lambda group=group: compiled(x, 8, group), request.device),
        }
    return {"shape": [tokens, columns], "copy": milliseconds(x.clone, request.device), "milliseconds": rows}


def milliseconds(work: Any, device: str, repeats: int = 30) -> float:
    """The median time of `work`, with device events on a GPU."""
    import statistics
    import time

    for _ in range(3):
        work()
    times = []
    for _ in range(repeats):
        if device == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            work()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end))
        else:
            begun = time.perf_counter()
            work()
            times.append(1e3 * (time.perf_counter() - begun))
    return statistics.median(times)
