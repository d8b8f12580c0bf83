"""CKA of 20 x 20 layers of two ResNet-20, batches of 256: this package and torch-cka, in one process.

python packages/dpk/benchmarks/cka_table.py       (torch-cka: the extra "benchmark")
"""

import importlib.util
import statistics
import time
import warnings

import torch
from dpk.cka_report import cka_matrix
from dpk.networks import create_model
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

LAYERS, BATCH, BATCHES, REPETITIONS = 20, 256, 1, 3


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    networks = [create_model("resnet20", 10).eval() for _ in range(2)]
    layers = [name for name, module in networks[0].named_modules() if isinstance(module, nn.Conv2d)][:LAYERS]
    images = torch.randn(BATCH * BATCHES, 3, 32, 32)

    def ours() -> torch.Tensor:
        matrix = cka_matrix(*networks, images.split(BATCH), first_layers=layers, second_layers=layers)
        return matrix.values

    runs = {"dpk": ours}
    if importlib.util.find_spec("torch_cka"):
        from torch_cka import CKA

        def peer() -> torch.Tensor:
            loader = DataLoader(TensorDataset(images, torch.zeros(len(images))), BATCH)
            cka = CKA(*networks, model1_layers=layers, model2_layers=layers, device="cpu")
            cka.compare(loader, loader)
            return cka.export()["CKA"]

        runs["torch-cka"] = peer
    else:
        print("torch-cka is not installed: it is left out")
    times, values = {name: [] for name in runs}, {}
    for _ in range(REPETITIONS):
        for name, run in runs.items():
            begun = time.perf_counter()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                values[name] = run()
            times[name].append(time.perf_counter() - begun)
    for name, seconds in times.items():
        print(f"{name}: {statistics.median(seconds):.2f} s")
    if "torch-cka" in runs:
        print(f"ratio {statistics.median(times['torch-cka']) / statistics.median(times['dpk']):.1f}")
        print(f"largest difference {float((values['torch-cka'] - values['dpk']).abs().max()):.1e}")


if __name__ == "__main__":
    main()
