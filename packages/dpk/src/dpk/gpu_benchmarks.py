"""dpk's measurements for the GPU queue: steps by method, tables of CKA, a detector's step."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from papercore.gpu import Request, Task
from torch import Tensor, nn

from dpk.benchmark import benchmark_steps
from dpk.cka_report import cka_matrix
from dpk.networks import create_model


def tasks() -> list[Task]:
    return [
        Task("check-all-pairs-cka", "check", 93, 0.5, check_all_pairs),
        Task("check-detector", "check", 92, 1.0, check_detector),
        Task("benchmark-step", "benchmark", 70, 3.0, benchmark_step),
        Task("benchmark-all-pairs-cka", "benchmark", 60, 1.0, benchmark_all_pairs),
    ]


def networks_and_layers(tiny: bool) -> tuple[list[nn.Module], list[str]]:
    """Two networks with fresh weights, and up to 20 convolutions that both have."""
    made: list[nn.Module] = []
    for seed in (0, 1):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made.append(create_model("resnet8" if tiny else "resnet20", 10).eval())
    return made, [name for name, module in made[0].named_modules() if isinstance(module, nn.Conv2d)][:20]


def check_all_pairs(request: Request) -> Mapping[str, Any]:
    """The table of CKA on the device against that in float64 on the CPU, over two minibatches."""
    networks, layers = networks_and_layers(request.tiny)
    images = torch.randn(16 if request.tiny else 128, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def table(dtype: torch.dtype, device: str) -> Tensor:
        first, second = (network.to(device, dtype) for network in networks)
        batches = images.to(dtype).chunk(2)
        return cka_matrix(first, second, batches, first_layers=layers, second_layers=layers, device=device).values

    found, expected = table(torch.float32, request.device), table(torch.float64, "cpu")
    error = float((found - expected).abs().max())
    if not error < 2e-2:  # convolutions may round to TF32, and deep random layers hardly tell images apart
        raise AssertionError(f"{error} away from float64 on the CPU")
    return {"layers": len(layers), "largest error": error}


def check_detector(request: Request) -> Mapping[str, Any]:
    """Steps of a small detector with DPK on its pyramid: losses are finite and the student gets gradient."""
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    from dpk.detection import NeckDistiller

    side = 64 if request.tiny else 320

    def detector(seed: int) -> FasterRCNN:
        torch.manual_seed(seed)
        backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=5)
        return FasterRCNN(backbone, 3, min_size=side, max_size=2 * side, rpn_post_nms_top_n_train=50)

    student = detector(0)
    distiller = NeckDistiller(student.train(), detector(1), size=(side, side)).to(request.device)
    box = torch.tensor([[8.0, 8.0, 40.0, 48.0]], device=request.device)
    targets = [{"boxes": box, "labels": torch.tensor([1], device=request.device)}]
    generator = torch.Generator().manual_seed(0)
    sizes = (2, 4)  # CKA over pixels, over images
    for count in sizes:
        images = [torch.rand(3, side, side + 16, generator=generator).to(request.device) for _ in range(count)]
        losses = distiller(images, targets * count)
        torch.stack(list(losses.values())).sum().backward()
        values = {name: float(loss.detach()) for name, loss in losses.items()}
        if not all(abs(value) < float("inf") for value in values.values()):
            raise AssertionError(f"losses that are not finite: {values}")
    gradient = next(student.backbone.parameters()).grad
    if gradient is None or not float(gradient.abs().sum()) > 0:
        raise AssertionError("the student gets no gradient")
    return {"levels": len(distiller.levels), "rho": distiller.method.info()["rho"].tolist()}


def benchmark_step(request: Request) -> Mapping[str, Any]:
    """Steps of every method, ResNet-56 -> ResNet-20, with ratios and peak memory."""
    if request.tiny:
        return {"batch 4": benchmark_steps("resnet8", "resnet8", 4, 1, device=request.device)["steps"].records()}
    return {
        f"batch {batch}": benchmark_steps("resnet56", "resnet20", batch, 30, device=request.device)["steps"].records()
        for batch in (64, 256)
    }


def benchmark_all_pairs(request: Request) -> Mapping[str, Any]:
    """Milliseconds of a table of 20 x 20 layers on a minibatch, and of the two networks alone."""
    networks, layers = networks_and_layers(request.tiny)
    first, second = (network.to(request.device) for network in networks)
    images = torch.randn(8 if request.tiny else 256, 3, 32, 32).to(request.device)

    def table() -> None:
        cka_matrix(first, second, [images], first_layers=layers, second_layers=layers, device=request.device)

    @torch.no_grad()
    def passes() -> None:
        first(images)
        second(images)

    runs: Mapping[str, Callable[[], None]] = {"networks alone": passes, "table": table}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repetition in range(2 if request.tiny else 12):
        for name, run in runs.items():
            if request.device == "cuda":
                torch.cuda.synchronize()
            begun = time.perf_counter()
            run()
            if request.device == "cuda":
                torch.cuda.synchronize()
            if repetition:
                times[name].append(1e3 * (time.perf_counter() - begun))
    return {"layers": len(layers), "milliseconds": {name: statistics.median(values) for name, values in times.items()}}
