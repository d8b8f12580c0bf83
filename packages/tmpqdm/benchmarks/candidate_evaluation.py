"""Candidate evaluation and calibration against the naive mode, in one process, in turn; prints medians and ratios.

    python candidate_evaluation.py [--device cpu] [--network digits|cifar10|all] [--batch N] [--repeats N] [--json FILE]

The naive mode is what the published scripts do: every forward pass quantises all weights again (choosing nothing anew,
with stored steps) and sends activations through a chain of operations; calibration runs the whole prefix of the network
again to get a unit's inputs. Both modes compute the same numbers up to the order of sums, which is checked first.
"""

import argparse
import contextlib
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DModel
from tmpqdm.calibration import CalibrationSet, collect_calibration
from tmpqdm.layers import QuantLayer
from tmpqdm.naive import naive_network
from tmpqdm.rounding import SoftRounding, regulariser, temperature
from tmpqdm.solver import PrecisionSolver
from tmpqdm.synthetic import random_mixture, tiny_unet
from torch import Tensor, nn


def cifar10_unet() -> UNet2DModel:
    """The network of the public CIFAR-10 DDPM, with random weights: 35.7 million parameters."""
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=32, block_out_channels=(128, 256, 256, 256), layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"), norm_eps=1e-6, downsample_padding=0,
        flip_sin_to_cos=False, freq_shift=1, attention_head_dim=None,
    )  # fmt: skip


def interleaved(works: dict[str, Callable[[], Any]], repeats: int, device: str) -> dict[str, float]:
    """Median seconds of every piece of work, run in turn."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for i in range(repeats + 1):
        for name in list(works) if i % 2 else list(reversed(works)):
            begun = time.perf_counter()
            works[name]()
            if device == "cuda":
                torch.cuda.synchronize()
            if i:  # the first round warms up
                times[name].append(time.perf_counter() - begun)
    return {name: statistics.median(values) for name, values in times.items()}


@torch.no_grad()
def candidates(model: nn.Module, batch: int, repeats: int, device: str) -> dict[str, float]:
    """Seconds of one forward pass at mixed bits, and of a switch."""
    model = model.to(device).eval()
    data = collect_calibration(model, DDPMScheduler(), samples=2, timesteps=[10, 300, 800])
    solver = PrecisionSolver.from_model(model)
    solver.calibrate(data, method="minmax", batch_size=2)
    mixtures = [random_mixture(solver, seed) for seed in range(4)]
    config: Any = model.config
    x = torch.randn(batch, config.in_channels, config.sample_size, config.sample_size, device=device)
    t = torch.full((batch,), 300, device=device)
    slow = naive_network(solver, mixtures[0])
    solver.set_bits(mixtures[0])
    check = solver.apply(mixtures[0])  # in the layout of the naive mode: another order of sums flips codes
    for module in check.modules():
        if isinstance(module, QuantLayer):
            module.dense = {bits: weight.contiguous() for bits, weight in module.dense.items()}
            module.use(**module.bits)
    theirs, mine = slow(x, t).sample, check(x, t).sample
    assert float((theirs - mine).square().mean() / theirs.square().mean()) < 1e-6
    turn = iter(range(10**9))
    found = interleaved(
        {
            "full precision": lambda: model(x, t),
            "naive": lambda: slow(x, t),
            "ours": lambda: solver.network(x, t),
            "switch": lambda: solver.set_bits(mixtures[next(turn) % 4]),
        },
        repeats,
        device,
    )
    return {f"seconds, {name}": value for name, value in found.items()} | {
        "naive / ours": found["naive"] / found["ours"],
        "ours / full precision": found["ours"] / found["full precision"],
    }


def naive_calibration(solver: PrecisionSolver, data: CalibrationSet, bits: int, iterations: int, size: int) -> None:
    """Rounding of every unit as published: the prefix runs again for every unit, weights are quantised as a chain."""
    network = copy.deepcopy(solver.network)
    found = {}
    for name, layer in solver.layers.items():
        module: Any = network.get_submodule(name)
        parts = []
        for half, w in zip(layer.halves[bits], layer.weights(), strict=True):
            parts.append(SoftRounding(w, half.delta, half.zero, bits))
        found[name] = (module, parts)

    def soft(module: Any, parts: list[SoftRounding]) -> list[Tensor]:
        made = []
        for part, w in zip(parts, module.weights(), strict=True):
            h = torch.clamp(torch.sigmoid(part.alpha) * 1.2 - 0.1, 0, 1)
            q = torch.clamp(torch.floor(w / part.delta) + h + part.zero, 0, 2**bits - 1)
            made.append((q - part.zero) * part.delta)
        return made

    for unit in solver.units:
        inside: Any = network.get_submodule(unit.name)
        caught: list[tuple[Any, Any]] = []

        def catch(module: Any, args: Any, kwargs: Any, output: Any, caught: Any = caught) -> None:
            caught.append((args, kwargs, output))
            raise StopIteration

        streams = []
        for quantised in (False, True):
            caught.clear()
            for name, (module, parts) in found.items():
                module.use()
                if quantised and not name.startswith(unit.name):
                    with torch.no_grad():
                        module.w = torch.cat(soft(module, parts), 1)
            handle = inside.register_forward_hook(catch, with_kwargs=True)
            with torch.no_grad():
                for begin in range(0, len(data), size):
                    rows = data[begin : begin + size]
                    with contextlib.suppress(StopIteration):
                        network(rows.x, rows.t)
            handle.remove()
            streams.append(list(caught))
        targets = torch.cat([output for *_, output in streams[0]])
        args = [torch.cat(parts) for parts in zip(*(args for args, *_ in streams[1]), strict=True)]
        extra = {
            key: torch.cat([kwargs[key] for _, kwargs, _ in streams[1]])
            for key, value in streams[1][0][1].items()
            if isinstance(value, Tensor)
        }
        own = [found[name] for name in unit.layers]
        optimiser = torch.optim.Adam([part.alpha for _, parts in own for part in parts], lr=1e-3)
        for step in range(1, iterations + 1):
            index = torch.randperm(len(data))[:size]
            optimiser.zero_grad()
            for module, parts in own:
                module.w = torch.cat(soft(module, parts), 1)
            output = inside(*(value[index] for value in args), **{key: value[index] for key, value in extra.items()})
            loss = (output - targets[index]).square().sum(1).mean()
            beta = temperature(step, iterations)
            if beta is not None:
                for _, parts in own:
                    for part in parts:
                        h = torch.clamp(torch.sigmoid(part.alpha) * 1.2 - 0.1, 0, 1)
                        loss = loss + regulariser(h, beta)
            loss.backward()
            optimiser.step()


def calibration(model: nn.Module, device: str, iterations: int, samples: int) -> dict[str, float]:
    """Seconds of a unit-iteration of rounding, everything included."""
    model = model.to(device).eval()
    data = collect_calibration(model, DDPMScheduler(), samples=samples, steps=40, use=8)
    solver = PrecisionSolver.from_model(model, bits=(4,))
    size = 16
    solver.calibrate(data, method="minmax", batch_size=size)
    solver._unset()
    times: dict[str, float] = {}
    begun = time.perf_counter()
    naive_calibration(solver, data, 4, iterations, size)
    times["naive"] = time.perf_counter() - begun
    begun = time.perf_counter()
    solver.calibrate(data, weight_iters=iterations, act_iters=0, batch_size=size)
    times["ours"] = time.perf_counter() - begun
    count = iterations * len(solver.units)
    return {f"seconds an iteration, {name}": value / count for name, value in times.items()} | {
        "naive / ours": times["naive"] / times["ours"]
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--network", choices=("digits", "cifar10", "all"), default="all")
    parser.add_argument(
        "--batch", type=int, default=0, help="images of a forward pass; 0: 64 for digits, 4 for cifar10"
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--calibration", action="store_true", help="also the calibration of the digits network")
    parser.add_argument("--iterations", type=int, default=20, help="of every unit, for the calibration")
    parser.add_argument("--samples", type=int, default=16, help="trajectories of 8 kept steps, for the calibration")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    networks = {"digits": (tiny_unet, 64), "cifar10": (cifar10_unet, 4)}
    results: dict[str, Any] = {"device": options.device, "threads": torch.get_num_threads()}
    for name, (make, batch) in networks.items():
        if options.network in (name, "all"):
            results[name] = candidates(make(), options.batch or batch, options.repeats, options.device)
    if options.calibration:
        results["calibration, digits"] = calibration(tiny_unet(), options.device, options.iterations, options.samples)
    print(json.dumps(results, indent=2))
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
