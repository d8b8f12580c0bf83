"""All of tmpqdm's work for the GPU queue: the solver's tasks, and those of sampling and search."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from papercore.gpu import Request, Task

from tmpqdm import gpu_tasks


def tasks() -> list[Task]:
    return [
        *gpu_tasks.tasks(),
        Task("check-sampling", "check", 93, 0.5, check_sampling, requires=("diffusers",)),
        Task(
            "reproduce-small", "reproduction", 78, 12.0, reproduce_small, requires=("diffusers", "optuna"),
            needs_data=True,
        ),
    ]  # fmt: skip


def check_sampling(request: Request) -> Mapping[str, Any]:
    """Pictures of both samplers on the device against the CPU: the same noise, nearly the same pictures."""
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    from tmpqdm.sampling import Sampling
    from tmpqdm.synthetic import tiny_unet

    model: Any = tiny_unet().eval()
    worst = 0.0
    cases: tuple[dict[str, Any], ...] = ({}, {"eta": 0.5}, {"sampler": "dpmpp-2m"})
    for options in cases:
        sampling = Sampling.of(model, DDPMScheduler(), batch_size=7, **options)
        count = 4 if request.tiny else 64
        here = sampling(model.to("cpu"), [0, 88, 355, 800], count, 0)
        there = sampling(model.to(request.device), [0, 88, 355, 800], count, 0)
        worst = max(worst, float((here - there).norm() / here.norm()))
    model.to("cpu")
    if not worst < 1e-2:
        raise AssertionError(f"relative difference {worst} between the devices")
    return {"worst relative difference": worst}


def reproduce_small(request: Request) -> Mapping[str, Any]:
    """The claims at small scale; the data folder has CIFAR-10 and the ResNet-56."""
    import tempfile
    from pathlib import Path

    from papercore.reproduce import Settings

    from tmpqdm import reproduce

    effort = reproduce.SMALL
    if request.tiny:
        effort = dataclasses.replace(
            effort, train_steps=2, steps=2, population=2, generations=1, images=140, check_images=140, check_seeds=1,
            calibration=2, sensitivity=2, method="minmax", mixture_iterations=2,
        )  # fmt: skip
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings("small", Path(folder), request.data, request.device, 0, lambda text: None)
        result = reproduce.run_small(settings, effort)
    return {
        "claims": [dataclasses.asdict(claim) for claim in result.claims],
        "tables": {table.title: table.records() for table in result.tables},
        "text": result.text,
    }
