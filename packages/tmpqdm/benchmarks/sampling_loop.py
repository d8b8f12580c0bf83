"""What sampling adds to the bare forward passes of the network.

    python packages/tmpqdm/benchmarks/sampling_loop.py

Both in one process, alternating, medians of pairs.
"""

import statistics
import time

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from papercore.report import Table
from tmpqdm.sampling import Sampling
from tmpqdm.train import build_cifar_unet, build_digits_unet


def main() -> None:
    rows = []
    timesteps = [0, 9, 39, 88, 158, 246, 355, 483, 632, 800]
    for name, model, batch in (("digits UNet", build_digits_unet(0), 64), ("CIFAR-10 UNet", build_cifar_unet(0), 8)):
        model.eval()
        sampling = Sampling.of(model, DDPMScheduler(), batch_size=batch)
        x = torch.randn(batch, *sampling.shape)
        loops, bare = [], []
        sampling(model, timesteps, batch, 0)
        for _ in range(5):
            begun = time.perf_counter()
            sampling(model, timesteps, batch, 0)
            loops.append(time.perf_counter() - begun)
            begun = time.perf_counter()
            with torch.no_grad():
                for step in reversed(timesteps):
                    model(x, torch.full((batch,), step), return_dict=False)
            bare.append(time.perf_counter() - begun)
        overhead = statistics.median(a / b for a, b in zip(loops, bare, strict=True)) - 1
        rows.append((name, batch, statistics.median(bare), statistics.median(loops), f"{100 * overhead:.1f} %"))
    columns = ("network", "batch", "forward passes, s", "sampling, s", "overhead")
    print(Table("DDIM on ten timesteps", columns, rows).to_terminal())


if __name__ == "__main__":
    main()
