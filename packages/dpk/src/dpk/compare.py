"""Several methods with the same seeds, in one table with standard errors."""

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from papercore.errors import InputError
from papercore.report import Table
from papercore.training import TrainConfig
from torch import Tensor, nn
from torch.utils.data import Dataset

from dpk.distiller import Distiller
from dpk.method import Method
from dpk.training import Prepare, train


@dataclasses.dataclass(frozen=True)
class Compared:
    """What one method reached."""

    method: str
    last: list[float]
    """top-1 in percent after the last epoch, a number for every seed"""
    best: list[float]
    """of the best epoch; chosen on the test set, so it flatters"""
    seconds: list[float]


def compare(
    make_student: Callable[[int], nn.Module],
    teacher: nn.Module | None,
    methods: Mapping[str, Callable[[], Method]],
    dataset: Dataset[Any],
    test: Dataset[Any],
    config: TrainConfig,
    out: Path,
    *,
    seeds: Sequence[int],
    example: Tensor,
    prepare: Prepare | None = None,
    device: str = "auto",
    resume: bool = True,
) -> list[Compared]:
    """Trains a student for every method and seed in folders of their own; finished ones are only loaded.

    Args:
        make_student: seed -> a student with the first weights of that seed.
        methods: name -> makes the method.
        config: its seed is replaced.
        example: an input for the networks.

    Returns:
        A row for every method; none in all but the first of several processes.

    Raises:
        InputError: no method or seed, or a seed twice.
    """
    if not methods:
        raise InputError("methods", found="none", expected="at least one")
    if not seeds or len(set(seeds)) != len(seeds):
        raise InputError("seeds", found=list(seeds), expected="at least one, each once")
    compared = []
    for name, make in methods.items():
        last, best, seconds = [], [], []
        for seed in seeds:
            distiller = Distiller(make_student(seed), teacher, make(), example, seed=seed)
            result = train(
                distiller,
                dataset,
                dataclasses.replace(config, seed=seed),
                out / f"{name}-seed{seed}",
                test=test,
                prepare=prepare,
                device=device,
                resume=resume,
                label=f"{name}, seed {seed}",
                provenance={"compared": name},
            )
            if not result.is_main:
                continue
            assert result.last is not None
            assert result.best is not None
            last.append(result.last.top1)
            best.append(result.best[0])
            seconds.append(result.seconds)
        if last:
            compared.append(Compared(name, last, best, seconds))
    return compared


def comparison_table(compared: Sequence[Compared], title: str = "top-1, percent") -> Table:
    """One row a method: mean and standard error over the seeds, after the last epoch and at the best one."""
    columns = ("method", "last epoch", "best epoch (chosen on the test set)", "seeds", "seconds a run")
    rows = [
        (c.method, mean_and_error(c.last), mean_and_error(c.best), len(c.last), statistics.fmean(c.seconds))
        for c in compared
    ]
    return Table(title, columns, rows)


def mean_and_error(values: Sequence[float]) -> str:
    """ "71.6 ± 0.5": mean and standard error; one value has no error."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:.2f}"
    return f"{mean:.2f} ± {statistics.stdev(values) / len(values) ** 0.5:.2f}"
