"""Searched against uniform group sizes at equal cost on the CIFAR-10 DiT, on held-out inputs.

    python packages/qdit/benchmarks/search_cifar10.py DATA_FOLDER

Five to ten minutes on two cores. Prints the table and writes results/search-cifar10.json.
"""

import sys
from pathlib import Path

from papercore.rundir import environment, write_json
from qdit.calibration import collect_calibration
from qdit.cifar10 import load_dit
from qdit.config import QDiTConfig
from qdit.granularity import noise_fitness, search_group_sizes

INPUTS, STEPS = 48, 10


def main(data: Path) -> None:
    model = load_dit(data)
    calibration, held_out = (collect_calibration(model, samples=INPUTS, steps=STEPS, seed=seed) for seed in (0, 1))
    result = search_group_sizes(
        model,
        QDiTConfig(4, 8, gptq=False),
        noise_fitness(model, calibration),
        menu=(32, 64, 128, 256),
        limit=128,
        population=12,
        top_k=5,
        iterations=10,
        seed=0,
        held_out=noise_fitness(model, held_out),
    )
    print(result.table.to_terminal())
    record = {"inputs": INPUTS, "steps": STEPS, "table": result.table.records(), "best": result.best}
    write_json(Path(__file__).parent / "results" / "search-cifar10.json", {**record, "environment": environment()})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
