"""Speed of prance's paths against timm's DeiT-S and a ToMe-style DeiT-S, one process, all ways in turn.

    python packages/prance/benchmarks/speed.py [--quick] [--batch 8] [--repeats 7] [--threads 1] [--out times.json]

The same as `prance benchmark`; kept results are in `results/`.
"""

import sys

from papercore import cli
from prance.commands.benchmark import Benchmark

if __name__ == "__main__":
    sys.exit(cli.main("speed", {"speed": Benchmark}, __doc__ or "", ["speed", *sys.argv[1:]]))
