"""tmpqdm's work for the GPU queue: the solver's part. The search's is added where it is listed in `pyproject.toml`."""

from collections.abc import Mapping
from typing import Any

import torch
from papercore.gpu import Request, Task
from papercore.gpu_checks import milliseconds


def tasks() -> list[Task]:
    return [
        Task("check-fake-quantise", "check", 96, 0.5, check_fake_quantise),
        Task("check-solver", "check", 94, 1.0, check_solver, requires=("diffusers",)),
        Task("benchmark-candidate", "benchmark", 85, 3.0, benchmark_candidate, requires=("diffusers",)),
    ]


def check_fake_quantise(request: Request) -> Mapping[str, Any]:
    """The kernel on the device against the CPU, bit for bit, in three types and two layouts."""
    from tmpqdm.quantisers import Step

    generator = torch.Generator().manual_seed(0)
    compared = 0
    for shape in ((3, 5, 7, 9), (2, 16, 8, 8)) if request.tiny else ((17, 130, 33, 31), (64, 128, 32, 32)):
        x = torch.randn(shape, generator=generator) * 3
        x.view(-1)[0] = float("nan")
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for bits, symmetric, zero in ((8, False, 100.0), (6, True, 0.0), (3, False, 2.0), (16, True, 0.0)):
                here = Step(torch.tensor(0.037), torch.tensor(zero), bits, symmetric)
                there = here.to(torch.device(request.device))
                for layout in (torch.contiguous_format, torch.channels_last):
                    given = x.to(dtype).contiguous(memory_format=layout)
                    found = there(given.to(request.device)).cpu()
                    if not torch.equal(found.nan_to_num(99), here(given).nan_to_num(99)):
                        raise AssertionError(f"{dtype}, {bits} bits, symmetric {symmetric}, {layout}: other values")
                    compared += x.numel()
                cut = x.to(dtype)[:, 1:3]
                if not torch.equal(there(cut.to(request.device)).cpu(), here(cut)):
                    raise AssertionError(f"{dtype}, {bits} bits: a slice of channels has other values")
    return {"values compared": compared}


def check_solver(request: Request) -> Mapping[str, Any]:
    """Calibrated there and evaluated on both devices: outputs of uniform settings agree, far below their own error."""
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    from tmpqdm.calibration import collect_calibration
    from tmpqdm.models import predict
    from tmpqdm.solver import PrecisionSolver
    from tmpqdm.synthetic import tiny_unet

    model: Any = tiny_unet()
    model.to(request.device)
    data = collect_calibration(model, DDPMScheduler(), samples=4, timesteps=[20, 300, 800])
    solver = PrecisionSolver.from_model(model, bits=(8, 4))
    iterations = 2 if request.tiny else 50
    solver.calibrate(data, weight_iters=iterations, act_iters=iterations, batch_size=4)
    worst = 0.0
    for bits in solver.bits:
        there = solver.apply(solver.uniform(bits))
        with torch.no_grad():
            found = predict(there, data.x.to(request.device), data.t.to(request.device), {}).cpu()
            expected = predict(there.to("cpu"), data.x, data.t, {})
        worst = max(worst, float((found - expected).square().mean() / expected.square().mean()))
    if not worst < 1e-2:  # single codes may differ, by the order of sums
        raise AssertionError(f"relative squared difference {worst} between the devices")
    return {"worst relative squared difference": worst}


def benchmark_candidate(request: Request) -> Mapping[str, Any]:
    """Milliseconds of a forward pass: full precision, ours, ours compiled, and the naive chain with weights quantised
    in every pass."""
    from diffusers.models.unets.unet_2d import UNet2DModel
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    from tmpqdm.calibration import collect_calibration
    from tmpqdm.naive import naive_network
    from tmpqdm.solver import PrecisionSolver
    from tmpqdm.synthetic import random_mixture, tiny_unet

    torch.manual_seed(0)
    model: Any = tiny_unet() if request.tiny else UNet2DModel(
        sample_size=32, block_out_channels=(128, 256, 256, 256), layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"), norm_eps=1e-6, downsample_padding=0,
        flip_sin_to_cos=False, freq_shift=1, attention_head_dim=None,
    )  # fmt: skip
    model.to(request.device).eval()
    config = model.config
    data = collect_calibration(model, DDPMScheduler(), samples=4, timesteps=[10, 300, 800])
    solver = PrecisionSolver.from_model(model)
    solver.calibrate(data, method="minmax", batch_size=4)
    mixture = random_mixture(solver, 0)
    solver.set_bits(mixture)
    slow = naive_network(solver, mixture)
    compiled = torch.compile(solver.network) if request.device == "cuda" else solver.network
    results = {}
    for batch in (2,) if request.tiny else (4, 32, 128):
        x = torch.randn(batch, config.in_channels, config.sample_size, config.sample_size, device=request.device)
        t = torch.full((batch,), 300, device=request.device)
        with torch.no_grad():
            times = {
                "full precision": milliseconds(lambda x=x, t=t: model(x, t), request.device),
                "naive": milliseconds(lambda x=x, t=t: slow(x, t), request.device),
                "ours": milliseconds(lambda x=x, t=t: solver.network(x, t), request.device),
                "ours, compiled": milliseconds(lambda x=x, t=t: compiled(x, t), request.device),
            }
        results[str(batch)] = times | {
            "naive / ours": times["naive"] / times["ours"],
            "naive / ours, compiled": times["naive"] / times["ours, compiled"],
        }
    return {"milliseconds, by batch": results}
