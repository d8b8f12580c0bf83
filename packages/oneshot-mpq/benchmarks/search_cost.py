"""What a search costs: configurations measured, and seconds, by method, on an untrained ResNet of CIFAR's kind.

    python benchmarks/search_cost.py [--depth 8] [--images 64]

The second budget of a front reuses what the first measured.
"""

import argparse
import time

import torch
from oneshot_mpq import BitConfig, Supernet
from oneshot_mpq.models import seeded_model
from oneshot_mpq.search import search_front
from torch.utils.data import DataLoader, TensorDataset


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=8, choices=(8, 20, 32))
    parser.add_argument("--images", type=int, default=64)
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(options.images, 3, 32, 32, generator=generator)
    y = torch.randint(10, (options.images,), generator=generator)
    net = Supernet(seeded_model(f"cifar-resnet{options.depth}", 10, 3, 0), x[:2])
    net.calibrate(x)
    loader = DataLoader(TensorDataset(x, y), 256)
    budgets = [{"bitops_G": BitConfig.uniform(net, b, b).bitops_G} for b in (4, 3)]
    for method in ("greedy", "ilp"):
        counted = 0
        start = time.perf_counter()
        front = search_front(net, loader, budgets, method)
        seconds = time.perf_counter() - start
        for name, result in zip(("W4A4", "W3A3"), front.results, strict=True):
            print(f"{method:8s} {name}: {result.evaluations - counted} new configurations measured")
            counted = result.evaluations
        print(f"{method:8s} both: {seconds:.1f} s, {1e3 * seconds / counted:.1f} ms a configuration")


if __name__ == "__main__":
    main()
