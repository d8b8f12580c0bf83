"""`prance benchmark`: images a second of our paths, of timm's DeiT and of a ToMe-style DeiT, measured in one run.

Weights are random: speed does not depend on them, except through the decisions, and those are drawn here. All ways
take turns, in an order that is reversed every other round, so that a busy moment of the machine falls on all of them;
medians are shown. Ratios above 1 are faster than DeiT.
"""

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from papercore.errors import InputError
from papercore.report import Table
from papercore.rundir import environment, write_json
from torch import Tensor, nn

from prance.decision import Decision
from prance.executor import Path as PathName
from prance.executor import execute
from prance.export import StaticViT
from prance.macs import macs
from prance.space import SearchSpace
from prance.supernet import MetaViT
from prance.tome import ToMeViT

PEER = "timm DeiT-S"
COLUMNS = ("way", "GMAC an image", "images/s", "ratio to DeiT", "ms an image", "remark")
TOME_GMAC = 2.70
"""DeiT-S with 13 tokens merged in every block, by the count of `macs` (merging itself not counted)"""


@dataclasses.dataclass(frozen=True)
class Way:
    """One line of the table."""

    name: str
    gmac: float
    run: Callable[[Tensor], Any]
    dtype: torch.dtype = torch.float32


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is timed."""

    batch: int = 8
    repeats: int = 7
    tiny: bool = False
    """smallest networks: does it run at all?"""

    def __post_init__(self) -> None:
        for name in ("batch", "repeats"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name}", found=getattr(self, name), expected="at least 1")

    @property
    def space(self) -> SearchSpace:
        if self.tiny:
            return SearchSpace((24, 32), (1.0, 2.0), group=2, depth=6, heads=2, head_dim=8)
        return SearchSpace.reference("small")

    def network(self) -> MetaViT:
        options: dict[str, Any] = {"image_size": 32, "patch_size": 8} if self.tiny else {}
        return MetaViT(self.space, 10 if self.tiny else 1000, **options).eval()

    def deit(self) -> Any:
        if self.tiny:
            options: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "num_heads": 2, "depth": 6}
            return timm.create_model("vit_tiny_patch16_224", num_classes=10, **options).eval()
        return timm.create_model("deit_small_patch16_224").eval()


def per_image(space: SearchSpace, batch: int, target: float, net: MetaViT, seed: int = 0) -> Decision:
    """Decisions that differ from image to image, in widths, ratios and pruning, of a given mean number of GMACs.

    The first group runs at the largest choice, as under a selector. Keep ratios are drawn around the one that meets
    the mean, which is found by halving.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = Decision.random(space, generator, batch=batch)
    largest = Decision.largest(space, batch)
    first = slice(0, space.group)
    drawn.embed[:, first], drawn.mlp_ratio[:, first] = largest.embed[:, first], largest.mlp_ratio[:, first]
    spread = 0.7 + 0.6 * torch.rand(batch, len(space.points), generator=generator, dtype=torch.float64)
    low, high = 0.0, 1.0
    made = drawn
    for _ in range(30):
        keep = (spread * (low + high) / 2).clamp(0.02, 1)
        made = dataclasses.replace(drawn, prune=keep)
        mean = float(macs(net, made).double().mean())
        low, high = ((low + high) / 2, high) if mean < target * 1e9 else (low, (low + high) / 2)
    return made


def codebook_of(decision: Decision, prototypes: int = 4) -> Decision:
    """The same pruning, the widths and ratios of the first few images only, and theirs alike inside a group."""
    space = decision.space
    rows = torch.arange(len(decision)) % prototypes
    return dataclasses.replace(decision, embed=decision.embed[rows], mlp_ratio=decision.mlp_ratio[rows], space=space)


@torch.no_grad()
def ways(sizes: Sizes, device: str) -> list[Way]:
    """Everything that is compared; the first line is DeiT."""
    torch.manual_seed(0)
    net, deit = sizes.network().to(device), sizes.deit().to(device)
    space, batch = sizes.space, sizes.batch
    half = next((width for width in space.embed if width >= 352), space.embed[0])
    ratio = space.mlp_ratio[len(space.mlp_ratio) // 2]
    largest = Decision.largest(space)

    def gmac(decision: Decision) -> float:
        return float(macs(net, decision).double().mean()) / 1e9

    def path(name: PathName, decision: Decision) -> Callable[[Tensor], Any]:
        many = decision.expand(batch)
        return lambda images: execute(net, images, many, path=name).logits

    pruned = Decision.static(space, half, ratio, prune=0.5)
    merged = Decision.static(space, half, ratio, merge=0.5)
    deit_macs = 0.0 if sizes.tiny else 4.598882304
    lines = [
        Way(PEER, deit_macs, deit),
        Way("DeiT-S, ToMe-style, 13 tokens a block", 0.0 if sizes.tiny else TOME_GMAC, ToMeViT(deit, 13)),
        Way("largest subnet, sliced", gmac(largest), path("sliced", largest)),
        Way("static prune 0.5, sliced", gmac(pruned), path("sliced", pruned)),
        Way("static prune 0.5, cut out", gmac(pruned), StaticViT(net, pruned)),
        Way("static merge 0.5, sliced", gmac(merged), path("sliced", merged)),
        Way("static merge 0.5, cut out", gmac(merged), StaticViT(net, merged)),
    ]
    smallest, biggest = (gmac(d) for d in (dataclasses.replace(largest, prune=pruned.prune * 0), largest))
    for target in (0.5 * biggest, 0.7 * biggest) if sizes.tiny else (2.36, 2.95):
        decision = per_image(space, batch, max(target, smallest), net)
        codebook = codebook_of(decision)
        lines += [
            Way(f"per image {target:.3g} G, packed", gmac(decision), path("packed", decision)),
            Way(f"per image {target:.3g} G, bucketed", gmac(decision), path("bucketed", decision)),
            Way(f"per image {target:.3g} G, packed, 4 prototypes", gmac(codebook), path("packed", codebook)),
            Way(f"per image {target:.3g} G, masked", gmac(decision), path("masked", decision)),
        ]
    return lines + halves(sizes, net, deit, pruned, device)


def halves(sizes: Sizes, net: MetaViT, deit: nn.Module, pruned: Decision, device: str) -> list[Way]:
    """bfloat16 lines, where the device multiplies it in hardware."""
    features: dict[str, bool] = {}
    with contextlib.suppress(AttributeError):
        features = dict(torch.cpu.get_capabilities())
    if device == "cpu" and not features.get("avx512_bf16", False) and not features.get("amx_bf16", False):
        return []
    import copy

    half = torch.bfloat16
    cut = StaticViT(copy.deepcopy(net).to(half), pruned)
    gmac = cut.macs / 1e9
    return [
        Way(f"{PEER}, bfloat16", 0.0 if sizes.tiny else 4.598882304, copy.deepcopy(deit).to(half), half),
        Way("static prune 0.5, cut out, bfloat16", gmac, cut, half),
    ]


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Runs with this many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@torch.inference_mode()
def timings(lines: list[Way], images: Tensor, repeats: int) -> dict[str, list[float]]:
    """Seconds of every way, one number a round, after one round that does not count.

    On a CPU these are seconds of processor time of all threads, which other programs disturb less than the clock.
    """
    clock = time.perf_counter if images.is_cuda else time.process_time
    inputs = {dtype: images.to(dtype) for dtype in {line.dtype for line in lines}}
    seconds: dict[str, list[float]] = {line.name: [] for line in lines}
    for turn in range(repeats + 1):
        for line in lines if turn % 2 else lines[::-1]:
            if images.is_cuda:
                torch.cuda.synchronize()
            started = clock()
            line.run(inputs[line.dtype])
            if images.is_cuda:
                torch.cuda.synchronize()
            if turn:
                seconds[line.name].append(clock() - started)
    return seconds


def ratios(seconds: dict[str, list[float]]) -> dict[str, float]:
    """What the targets are about: how many times faster the second is than the first named, medians of the rounds."""

    def faster(slow: str, fast: str) -> float | None:
        if slow not in seconds or fast not in seconds:
            return None
        return statistics.median(a / b for a, b in zip(seconds[slow], seconds[fast], strict=True))

    found = {
        "static over DeiT-S": faster(PEER, "static prune 0.5, cut out"),
        "merging over pruning (time)": faster("static merge 0.5, cut out", "static prune 0.5, cut out"),
        "bfloat16 over float32": faster("static prune 0.5, cut out", "static prune 0.5, cut out, bfloat16"),
    }
    for target in (name.split(",")[0] for name in seconds if name.endswith("masked")):
        found |= {
            f"{target}: packed over DeiT-S": faster(PEER, f"{target}, packed"),
            f"{target}: bucketed over DeiT-S": faster(PEER, f"{target}, bucketed"),
            f"{target}: packed over masked": faster(f"{target}, masked", f"{target}, packed"),
        }
    return {name: value for name, value in found.items() if value is not None}


def benchmark(
    sizes: Sizes = Sizes(),
    *,
    device: str = "cpu",
    thread_count: int = 1,
    out: Path | None = None,
) -> dict[str, Any]:
    """The table, the ratios that matter, and what the machine is.

    Args:
        thread_count: for every product on the CPU.
        out: JSON file for every single timing.

    Raises:
        InputError: numbers below 1.
    """
    if thread_count < 1:
        raise InputError("--threads", found=thread_count, expected="at least 1")
    with threads(thread_count):
        lines = ways(sizes, device)
        side = 32 if sizes.tiny else 224
        images = torch.randn(sizes.batch, 3, side, side, generator=torch.Generator().manual_seed(1)).to(device)
        seconds = timings(lines, images, sizes.repeats)
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    rows = []
    for line in lines:
        ratio = statistics.median(a / b for a, b in zip(seconds[PEER], seconds[line.name], strict=True))
        remark = "slower than DeiT-S" if ratio < 1 else ""
        time_each = middle[line.name] / sizes.batch
        rows.append((line.name, line.gmac or None, 1 / time_each, ratio, 1000 * time_each, remark))
    result = {
        "table": Table(f"batch {sizes.batch}, {thread_count} threads, {device}", COLUMNS, rows),
        "ratios": ratios(seconds),
        "machine": environment(),
    }
    if out is not None:
        write_json(
            out,
            {"seconds": seconds, "rows": result["table"].records(), **{k: result[k] for k in ("ratios", "machine")}},
        )
    return result
