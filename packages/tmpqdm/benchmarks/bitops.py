"""BitOps of candidates: the cost model over a population against the published way, a hooked forward a candidate.

    python packages/tmpqdm/benchmarks/bitops.py

Both in one process, alternating, medians; both must agree.
"""

import statistics
import time
from typing import Any

import numpy as np
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from papercore.report import Table
from tmpqdm.cost import CostModel
from torch import nn


def cifar_unet() -> UNet2DModel:
    """The public CIFAR-10 DDPM's shape: 35.7 M parameters."""
    return UNet2DModel(
        sample_size=32, block_out_channels=(128, 256, 256, 256), layers_per_block=2, norm_eps=1e-6,
        downsample_padding=0,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"), flip_sin_to_cos=False, freq_shift=1,
        attention_head_dim=None,
    )  # fmt: skip


def hooked(model: nn.Module, bits: dict[str, tuple[int, int]], inputs: tuple[torch.Tensor, torch.Tensor]) -> int:
    """Layers' BitOps of one image by a forward with hooks, as the published search counts every candidate."""
    total = 0
    handles = []

    def hook(name: str) -> Any:
        def count(module: Any, args: Any, output: torch.Tensor) -> None:
            nonlocal total
            each = module.weight[0].numel() * output.numel() // len(output)
            total += each * bits[name][0] * bits[name][1]

        return count

    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            handles.append(module.register_forward_hook(hook(name)))
    with torch.no_grad():
        model(*inputs)
    for handle in handles:
        handle.remove()
    return total


def main() -> None:
    torch.manual_seed(0)
    model = cifar_unet().eval()
    begun = time.perf_counter()
    meta = cifar_unet().to("meta")
    cost = CostModel.trace(meta, (torch.empty(1, 3, 32, 32, device="meta"), torch.zeros(1, device="meta")))
    tracing = time.perf_counter() - begun
    inputs = (torch.randn(2, 3, 32, 32), torch.tensor([500, 500]))
    rng = np.random.default_rng(0)
    population = rng.choice([8, 7, 6, 5], (1000, len(cost.genes)))
    edge = 2 * len(cost.layers)
    ours, theirs = [], []
    for trial in range(3):
        begun = time.perf_counter()
        counted = cost.bitops_many(population)
        ours.append((time.perf_counter() - begun) / len(population))
        row = population[trial]
        bits = {layer.name: (int(row[2 * i]), int(row[2 * i + 1])) for i, layer in enumerate(cost.layers)}
        begun = time.perf_counter()
        expected = hooked(model, bits, inputs)
        theirs.append(time.perf_counter() - begun)
        attention = sum(
            entry.qk * int(row[edge + 4 * i]) * int(row[edge + 4 * i + 1])
            + entry.sv * int(row[edge + 4 * i + 3]) * int(row[edge + 4 * i + 2])
            for i, entry in enumerate(cost.attentions)
        )
        assert int(counted[trial]) - attention == expected
    a, b = statistics.median(ours), statistics.median(theirs)
    rows = [("cost model, a candidate of 1000", 1e6 * a, 1.0), ("forward with hooks", 1e6 * b, b / a),
            ("tracing, once", 1e6 * tracing, tracing / a)]  # fmt: skip
    print(Table("BitOps of a candidate", ("way", "microseconds", "ratio"), rows).to_terminal())


if __name__ == "__main__":
    main()
