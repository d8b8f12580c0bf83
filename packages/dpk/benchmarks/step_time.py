"""Steps of DPK, FitNet and ReviewKD on ResNet-56 -> ResNet-20, interleaved in one process: times, ratios, memory.

python packages/dpk/benchmarks/step_time.py [batch size] [repetitions]
"""

import sys

import torch
from dpk.benchmark import benchmark_steps

if __name__ == "__main__":
    torch.set_num_threads(1)
    batch = int(sys.argv[1]) if len(sys.argv) > 1 else 64
    repetitions = int(sys.argv[2]) if len(sys.argv) > 2 else 30
    print(benchmark_steps("resnet56", "resnet20", batch, repetitions)["steps"].to_terminal())
