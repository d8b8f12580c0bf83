"""dpk's work for the GPU queue."""

import copy
import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from papercore.gpu import Request, Task
from torch import Tensor

from dpk import gpu_benchmarks
from dpk.alignment import cka
from dpk.digits import digits_net
from dpk.distiller import Distiller
from dpk.dpk_method import DPK


def tasks() -> list[Task]:
    return [
        Task("check-step", "check", 95, 0.5, check_step),
        Task("check-cka", "check", 94, 0.5, check_cka),
        Task("reproduce-small", "reproduction", 80, 30.0, reproduce_small, needs_data=True),
        *gpu_benchmarks.tasks(),
    ]


SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"momentum": 0.9, "target_norm": "layernorm", "mask": "block", "logit": "dkd"},
    {"per_image": True, "mask": "highest-error", "target_norm": "batch"},
    {"ratio": 0.25, "integrator": "conv", "samples": "tokens"},
)


def check_step(request: Request) -> Mapping[str, Any]:
    """A step on the device: it must not wait (an error in CUDA's sync debug mode), and with all of the student's own
    tokens (no random mask) its losses are those of the CPU."""
    worst = 0.0
    generator = torch.Generator().manual_seed(0)
    images, targets = torch.randn(32, 1, 8, 8, generator=generator), torch.arange(32) % 10
    for given in SETTINGS:
        networks = digits_net("student", 0), digits_net("large", 1)
        made = Distiller(*copy.deepcopy(networks), DPK(stages="all", **given), images[:2]).to(request.device)
        x, y = images.to(request.device), targets.to(request.device)
        for _ in range(2):  # the first call makes tables and chooses kernels
            made(x, y).total.backward()
        if request.device == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            made(x, y).total.backward()
        finally:
            if request.device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    losses = []
    for device in ("cpu", request.device):
        networks = digits_net("student", 0), digits_net("large", 1)
        made = Distiller(*networks, DPK(stages="all", ratio=0.0), images[:2]).to(device)
        out = made(images.to(device), targets.to(device))
        losses.append(torch.stack([*out.losses.values(), *out.info["cka"]]).detach().cpu())
    worst = float((losses[0] - losses[1]).abs().max() / losses[0].abs().max())
    if not worst < 1e-2:  # convolutions may round to TF32
        raise AssertionError(f"relative difference {worst} between the devices")
    return {"settings that do not wait": len(SETTINGS), "largest relative difference from the CPU": worst}


def check_cka(request: Request) -> Mapping[str, Any]:
    """CKA on the device against float64 on the CPU, and its time on a stage of specification 8."""
    from papercore.gpu_checks import milliseconds

    n, p, q = (16, 200, 300) if request.tiny else (256, 8192, 16384)
    generator = torch.Generator().manual_seed(0)
    x: Tensor = torch.randn(n, p, generator=generator)
    y = torch.cat([x, torch.randn(n, q - p, generator=generator)], 1)
    expected = float(cka(x.double(), y.double()))
    there = x.to(request.device), y.to(request.device)
    error = abs(float(cka(*there)) - expected)
    if not error < 2e-3:
        raise AssertionError(f"{error} away from float64 on the CPU")
    return {"error": error, "milliseconds": milliseconds(lambda: cka(*there), request.device)}


def reproduce_small(request: Request) -> Mapping[str, Any]:
    """The claims at small scale; the data folder has CIFAR-10 and its trained ResNets."""
    from papercore.reproduce import Settings

    from dpk import small

    with tempfile.TemporaryDirectory() as folder:
        settings = Settings("small", Path(folder), request.data, request.device, 0, lambda text: None)
        result = small.run(settings, small.TINY if request.tiny else small.FULL)
    return {
        "claims": [dataclasses.asdict(claim) for claim in result.claims],
        "tables": {table.title: table.records() for table in result.tables},
        "text": result.text,
    }
