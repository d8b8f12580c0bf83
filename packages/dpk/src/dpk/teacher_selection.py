"""Which teacher? A short run with every candidate, and what its feature gap says.

The paper's claim is that with DPK larger teachers make better students; its ratio is the gap itself. A short run (a
twentieth of the epochs) shows rho by stage for every candidate and the student's accuracy so far. The prediction is
that accuracy; the gaps are told besides, because a gap that does not fall is a teacher out of reach.
"""

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from papercore.errors import InputError
from papercore.report import Picture, Table
from papercore.training import TrainConfig
from torch import Tensor, nn
from torch.utils.data import Dataset

from dpk.distiller import Distiller
from dpk.method import Method
from dpk.training import Prepare, evaluate, train


@dataclasses.dataclass(frozen=True)
class Candidate:
    """What the short run with one teacher showed."""

    teacher: str
    parameters: int
    teacher_top1: float
    """percent"""
    top1: float
    """the student's after the short run; the ranking"""
    rho: list[float]
    """by epoch, mean over the stages"""
    gap: float | None
    """DPK's loss without the teacher's tokens on held-out pictures after the last epoch, mean over the stages"""
    seconds: float


def select_teacher(
    make_student: Callable[[], nn.Module],
    teachers: Mapping[str, nn.Module],
    make_method: Callable[[], Method],
    dataset: Dataset[Any],
    test: Dataset[Any],
    config: TrainConfig,
    out: Path,
    *,
    example: Tensor,
    prepare: Prepare | None = None,
    device: str = "auto",
    resume: bool = True,
) -> list[Candidate]:
    """The candidates, best first. Finished runs in `out` are only loaded.

    Args:
        make_student: gives the same student, with the same first weights, at every call.
        config: of the short run; its schedule should end with it, not be cut off.

    Raises:
        InputError: fewer than two teachers.
    """
    if len(teachers) < 2:
        raise InputError("teachers", found=len(teachers), expected="at least two")
    found = []
    for name, teacher in teachers.items():
        own = evaluate(teacher, test, prepare=prepare, device=device)
        distiller = Distiller(make_student(), teacher, make_method(), example, seed=config.seed)
        result = train(
            distiller,
            dataset,
            config,
            out / name.replace("/", "_"),
            test=test,
            prepare=prepare,
            device=device,
            resume=resume,
            label=f"teacher {name}",
            provenance={"teacher": name},
        )
        assert result.last is not None
        rho = [mean_of(record, "rho.") for record in result.records]
        gap = mean_of(result.records[-1], "gap.") if result.records else None
        parameters = sum(p.numel() for p in teacher.parameters())
        rhos = [value for value in rho if value is not None]
        found.append(Candidate(name, parameters, own.top1, result.last.top1, rhos, gap, result.seconds))
    return sorted(found, key=lambda candidate: -candidate.top1)


def mean_of(record: Mapping[str, Any], prefix: str) -> float | None:
    """The mean of a log line's entries of this prefix."""
    values = [value for name, value in record.items() if name.startswith(prefix)]
    return statistics.fmean(values) if values else None


def selection_table(candidates: Sequence[Candidate]) -> Table:
    columns = (
        *("rank", "teacher", "parameters", "teacher top-1", "student top-1", "rho at first", "rho at last", "gap"),
        "seconds",
    )
    rows = [
        (
            rank,
            c.teacher,
            c.parameters,
            c.teacher_top1,
            c.top1,
            c.rho[0] if c.rho else None,
            c.rho[-1] if c.rho else None,
            c.gap,
            c.seconds,
        )
        for rank, c in enumerate(candidates, start=1)
    ]
    return Table("teachers, predicted best first", columns, rows)


def rho_picture(candidates: Sequence[Candidate]) -> Picture:
    """The ratio over the epochs, a line a teacher."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5))
    axes = figure.subplots()
    for c in candidates:
        axes.plot(range(1, len(c.rho) + 1), c.rho, marker=".", label=c.teacher)
    axes.set_xlabel("epoch")
    axes.set_ylabel("rho, mean over the stages")
    axes.legend()
    axes.grid(alpha=0.3)
    return Picture.of_figure("share of the teacher's tokens", figure)


def rank_agreement(predicted: Sequence[float], final: Sequence[float]) -> float:
    """Spearman's rank correlation, to check a prediction against finished trainings; ties share their mean rank.

    Raises:
        InputError: fewer than two values, or unequal numbers.
    """
    import numpy as np

    if len(predicted) != len(final) or len(predicted) < 2:
        raise InputError("ranks", found=(len(predicted), len(final)), expected="equal numbers, at least two")
    ranks = []
    for values in (predicted, final):
        array = np.asarray(values)
        ranks.append([((array < v).sum() + (array <= v).sum() - 1) / 2 for v in array])
    if any(np.ptp(of) == 0 for of in ranks):
        return 0.0
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])
