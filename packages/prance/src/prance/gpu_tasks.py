"""prance's work for the GPU queue: one answer from all paths on the device, and images a second there."""

import copy
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch
from papercore.gpu import Request, Task
from papercore.gpu_checks import milliseconds
from torch import Tensor

from prance.benchmark import Sizes, codebook_of, per_image
from prance.decision import Decision
from prance.executor import Path, execute
from prance.export import StaticViT
from prance.macs import macs
from prance.supernet import MetaViT
from prance.tome import ToMeViT

PATHS: tuple[Path, ...] = ("masked", "packed", "bucketed")


def tasks() -> list[Task]:
    return [
        Task("check-paths", "check", 96, 1.0, check_paths),
        Task("check-bfloat16", "check", 92, 1.0, check_bfloat16),
        Task("benchmark-paths", "benchmark", 85, 4.0, benchmark_paths),
    ]


def _network(sizes: Sizes, scale: float) -> MetaViT:
    """Random weights large enough that scores and decisions matter."""
    torch.manual_seed(0)
    net = sizes.network()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter) * scale)
    return net


def _images(sizes: Sizes, seed: int = 1) -> Tensor:
    side = 32 if sizes.tiny else 224
    return torch.randn(sizes.batch, 3, side, side, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def check_paths(request: Request) -> Mapping[str, Any]:
    """All paths on the device against the sliced path image by image on the CPU, in float32 and float64."""
    sizes = Sizes(batch=6, tiny=request.tiny)
    net, images = _network(sizes, 0.2 if request.tiny else 0.02), _images(sizes)
    generator = torch.Generator().manual_seed(2)
    worst: dict[str, float] = {}
    for kind, limit in ((torch.float32, 1e-4), (torch.float64, 1e-9)):
        here, there = net.to(kind), copy.deepcopy(net).to(kind).to(request.device)
        x = images.to(kind)
        for tokens in (None, "prune", "merge", "prune_merge"):
            decision = Decision.random(sizes.space, generator, batch=sizes.batch, tokens=tokens)
            alone = [execute(here, x[i : i + 1], decision[i], path="sliced") for i in range(sizes.batch)]
            expected = torch.cat([one.logits for one in alone])
            for path in PATHS:
                found = execute(there, x.to(request.device), decision, path=path)
                error = float((found.logits.cpu() - expected).abs().max() / expected.abs().max().clamp(min=1))
                name = f"{path}, {tokens}, {kind}".replace("torch.", "")
                worst[name] = error
                if not error <= limit:
                    raise AssertionError(f"{name}: logits differ by {error} of the largest, at most {limit}")
    return {"largest difference of a logit, as a share of the largest": worst}


@torch.no_grad()
def check_bfloat16(request: Request) -> Mapping[str, Any]:
    """Packed, with variable-length attention, against sliced, both in bfloat16 on the device.

    Near-equal scores are ranked differently when sums are taken in another order, so classes are compared, not bits:
    packed must agree with sliced about as often as sliced agrees with float32.
    """
    sizes = Sizes(batch=16 if request.tiny else 256, tiny=request.tiny)
    net, images = _network(sizes, 0.2 if request.tiny else 0.02).to(request.device), _images(sizes).to(request.device)
    half = copy.deepcopy(net).to(torch.bfloat16)
    result: dict[str, Any] = {}
    for name, keep in (("no reduction", 1.0), ("prune 0.7", 0.7)):
        decision = Decision.static(sizes.space, sizes.space.embed[-2], sizes.space.mlp_ratio[1], prune=keep)
        many = decision.expand(len(images))
        exact = execute(net, images, many, path="sliced").logits
        sliced = execute(half, images.bfloat16(), many, path="sliced").logits.float()
        packed = execute(half, images.bfloat16(), many, path="packed").logits.float()
        scale = float(exact.std())
        result[name] = {
            "packed and sliced agree": float((packed.argmax(1) == sliced.argmax(1)).float().mean()),
            "sliced and float32 agree": float((sliced.argmax(1) == exact.argmax(1)).float().mean()),
            "packed from sliced, mean over deviation of the logits": float((packed - sliced).abs().mean()) / scale,
            "sliced from float32, mean over deviation of the logits": float((sliced - exact).abs().mean()) / scale,
        }
        numbers = result[name]
        if numbers["packed and sliced agree"] < numbers["sliced and float32 agree"] - 0.1:
            raise AssertionError(f"{name}: packed is further from sliced than bfloat16 is from float32: {numbers}")
    return result


@torch.no_grad()
def benchmark_paths(request: Request) -> Mapping[str, Any]:
    """Images a second, bfloat16: timm DeiT-S eager and compiled, ToMe-style, static, per image; in turn.

    Batch 1024 (the per-image target: mean 2.36 GMAC). Medians of three rounds.
    """
    sizes = Sizes(batch=8 if request.tiny else 1024, tiny=request.tiny)
    device, half = request.device, torch.bfloat16
    net, deit = sizes.network().to(device, half), sizes.deit().to(device, half)
    images = _images(sizes).to(device, half)
    space = sizes.space
    full = float(macs(net, Decision.largest(space))) / 1e9
    target = 0.5 * full if request.tiny else 2.36
    decision = per_image(space, sizes.batch, target, net)
    codebook = codebook_of(decision)
    half_pruned = Decision.static(space, space.embed[len(space.embed) // 2], space.mlp_ratio[1], prune=0.5)
    merged = Decision(space, half_pruned.embed, half_pruned.mlp_ratio, half_pruned.merge, half_pruned.prune)
    equal = equal_macs(net, space.embed[len(space.embed) // 2], target)

    def path(name: Path, chosen: Decision) -> Callable[[], Any]:
        many = chosen.expand(sizes.batch)
        return lambda: execute(net, images, many, path=name).logits

    modules = {
        "ToMe-style, 13 tokens a block": ToMeViT(deit, 13),
        "static prune 0.5": StaticViT(net, half_pruned),
        "static merge 0.5": StaticViT(net, merged),
        "static at the per-image mean": StaticViT(net, equal),
    }
    lines: dict[str, Callable[[], Any]] = {"timm DeiT-S": lambda: deit(images)}
    lines |= {name: (lambda module=module: module(images)) for name, module in modules.items()}
    if device != "cpu":
        compiled, static = torch.compile(deit), torch.compile(modules["static prune 0.5"])
        lines |= {
            "timm DeiT-S, compiled": lambda: compiled(images),
            "static prune 0.5, compiled": lambda: static(images),
        }
    lines |= {
        "per image, packed": path("packed", decision),
        "per image, packed, 4 prototypes": path("packed", codebook),
        "per image, bucketed": path("bucketed", decision),
        "per image, masked": path("masked", decision),
    }
    rounds = [
        {name: milliseconds(work, device) for name, work in lines.items()} for _ in range(1 if request.tiny else 3)
    ]
    times = {name: statistics.median(one[name] for one in rounds) for name in lines}
    packed = times["per image, packed"]
    ratios = {f"per image, packed, over {name}": time / packed for name, time in times.items()}
    ratios["static merge 0.5, time over prune"] = times["static merge 0.5"] / times["static prune 0.5"]
    return {
        "batch": sizes.batch,
        "GMAC": {
            "per image, mean": float(macs(net, decision).double().mean()) / 1e9,
            "static prune 0.5": float(macs(net, half_pruned)) / 1e9,
            "static at the per-image mean": float(macs(net, equal)) / 1e9,
        },
        "milliseconds": times,
        "images a second": {name: 1000 * sizes.batch / time for name, time in times.items()},
        "ratios": ratios,
    }


def equal_macs(net: MetaViT, width: int, target: float) -> Decision:
    """The static pruning of one width, whose GMACs are the target's."""
    low, high = 0.02, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        made = Decision.static(net.space, width, net.space.mlp_ratio[1], prune=middle)
        low, high = (middle, high) if float(macs(net, made)) < target * 1e9 else (low, middle)
    return Decision.static(net.space, width, net.space.mlp_ratio[1], prune=low)
