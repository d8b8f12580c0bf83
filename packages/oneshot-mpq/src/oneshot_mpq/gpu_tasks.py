"""oneshot-mpq's work for the GPU queue."""

import copy
import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from papercore.gpu import Request, Task
from papercore.gpu_checks import milliseconds

from oneshot_mpq.quantize_checks import gpu_checks


def tasks() -> list[Task]:
    return [
        *gpu_checks(),
        Task("check-step", "check", 95, 0.5, check_step),
        Task("benchmark-step", "benchmark", 60, 1.0, benchmark_step),
        Task("reproduce-small", "reproduction", 80, 12.0, reproduce_small, needs_data=True),
    ]


def _method(device: str, images: int) -> Any:
    """A calibrated ResNet-20 supernet, its method and a batch."""
    from oneshot_mpq import Supernet, TrainConfig
    from oneshot_mpq.models import seeded_model
    from oneshot_mpq.sandwich import Sandwich

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(images, 3, 32, 32, generator=generator)
    y = torch.randint(10, (images,), generator=generator)
    net = Supernet(seeded_model("cifar-resnet20", 10, 3, 0), x[:2])
    net.calibrate(x)
    net.to(device).train()
    method = Sandwich(net, TrainConfig(), 100)
    return method, (x.to(device), y.to(device))


def _step(method: Any, batch: Any) -> list[float]:
    method.net.zero_grad()
    values = []
    for loss in method.losses(method.net, batch, None):
        loss.backward()
        values.append(float(loss.detach()))
    return values


def check_step(request: Request) -> Mapping[str, Any]:
    """A whole training step on the device against the CPU, in float64: losses and all gradients within 1e-8."""
    method, (x, y) = _method("cpu", 4 if request.tiny else 32)
    method.net.double()
    method.begin_step(method.net, 0)
    expected = _step(method, (x.double(), y))
    twin = copy.deepcopy(method)
    twin.net.to(request.device)
    found = _step(twin, (x.double().to(request.device), y.to(request.device)))
    losses = max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))
    gradients = max(
        float((a.grad.cpu() - b.grad).norm() / b.grad.norm().clamp(min=1e-12))
        for a, b in zip(twin.net.parameters(), method.net.parameters(), strict=True)
        if b.grad is not None
    )
    if not max(losses, gradients) < 1e-8:
        raise AssertionError(f"relative difference to the CPU: losses {losses}, gradients {gradients}")
    return {"losses": losses, "gradients": gradients}


def benchmark_step(request: Request) -> Mapping[str, Any]:
    """Milliseconds of a sandwich step of ResNet-20 (four passes) against four passes of the float network."""
    from oneshot_mpq.models import seeded_model

    method, batch = _method(request.device, 8 if request.tiny else 512)
    method.begin_step(method.net, 0)
    plain = seeded_model("cifar-resnet20", 10, 3, 0).to(request.device).train()

    def floating() -> None:
        for _ in range(4):
            torch.nn.functional.cross_entropy(plain(batch[0]), batch[1]).backward()

    ours = milliseconds(lambda: _step(method, batch), request.device)
    four = milliseconds(floating, request.device)
    return {"sandwich step": ours, "four float passes": four, "ratio": ours / four}


def reproduce_small(request: Request) -> Mapping[str, Any]:
    """The claims on CIFAR-10 with a ResNet-20."""
    from papercore.reproduce import Settings

    from oneshot_mpq import reproduce

    with tempfile.TemporaryDirectory() as folder:
        settings = Settings("small", Path(folder), request.data, request.device, 0, lambda text: None)
        setting = dataclasses.replace(reproduce.SMALL, data=request.data, device=request.device)
        if request.tiny:
            setting = dataclasses.replace(
                setting,
                model="cifar-resnet8",
                float_epochs=1,
                epochs=2,
                batch_size=20,
                configurations=1,
                limit=40,
                finetuning=1,
                recalibration=20,
            )
        result = reproduce.study(settings, setting, 1 if request.tiny else reproduce.SEEDS)
    return {
        "claims": [dataclasses.asdict(claim) for claim in result.claims],
        "tables": {table.title: table.records() for table in result.tables},
        "text": result.text,
    }
