"""The claims at small scale: CIFAR-10 on one GPU (specification 4b).

Teachers are the widely used ResNet-20/32/44/56, trained further on the data folder's pictures (their weights were made
for other copies of the same pictures); the student is ResNet-8. Three seeds for every row. One half of the claims
compares methods with the ResNet-56, the other follows the teachers' sizes.
"""

import copy
import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from papercore import training as loop
from papercore.data.cifar_resnet import CifarResNet, load_cifar_resnet
from papercore.errors import InputError
from papercore.progress import track
from papercore.report import Picture, Table
from papercore.reproduce import Claim, Reproduction, Settings
from papercore.training import TrainConfig
from torch import Tensor, nn
from torch.nn import functional

from dpk.data import Normalise, Pictures, normalisation, read
from dpk.distiller import Distiller
from dpk.dpk_method import DPK
from dpk.method import CrossEntropy, Method
from dpk.methods import DKD, KD, FitNet, ReviewKD
from dpk.reproduce import mean_and_error
from dpk.teacher_selection import rank_agreement
from dpk.training import evaluate, train

CONSTANTS = (0.0, 0.25, 0.5, 0.75)


@dataclasses.dataclass(frozen=True)
class Effort:
    """How much is computed."""

    epochs: int = 30
    """of a student"""
    fine_tuning: int = 10
    """epochs of a teacher on these pictures"""
    seeds: int = 3
    teachers: tuple[int, ...] = (20, 32, 44, 56)
    batch_size: int = 256
    pictures: int | None = None
    """how many of each part; none: all"""
    mixed_precision: str = "bf16"


FULL = Effort()
TINY = Effort(epochs=1, fine_tuning=1, seeds=1, teachers=(20, 32), batch_size=16, pictures=20, mixed_precision="no")
"""does the code run at all?"""


def methods(teachers: Sequence[int]) -> dict[tuple[str, int | None], Callable[[], Method]]:
    """(row, depth of the teacher) -> makes the method. Taps, weights and norms are the same wherever they mean the
    same; none was chosen by these results."""
    taps: dict[str, Any] = {"stages": 2}
    feature: dict[str, Any] = taps | {"target_norm": "layernorm", "weight": 1.0}
    largest = max(teachers)
    rows: dict[tuple[str, int | None], Callable[[], Method]] = {("CE", None): CrossEntropy}
    for depth in teachers:
        rows["FitNet", depth] = lambda: FitNet(weight=1.0, **taps)
        rows["KD", depth] = lambda: KD(temperature=4.0, weight=0.9, ce_weight=0.1)
        rows["DPK", depth] = lambda: DPK(**feature)
    for share in CONSTANTS:
        rows[f"DPK rho {share:g}", largest] = lambda share=share: DPK(ratio=share, **feature)
    rows["KD + DPK", largest] = lambda: DPK(logit="kd", logit_weight=0.9, temperature=4.0, ce_weight=0.1, **feature)
    rows["ReviewKD", largest] = lambda: ReviewKD(weight=1.0, warmup=5)
    rows["DKD", largest] = lambda: DKD(alpha=1.0, beta=2.0, temperature=4.0, warmup=5)
    return rows


def run(settings: Settings, effort: Effort = FULL) -> Reproduction:
    """Fine-tunes the teachers, trains a student for every row and seed, judges. Finished trainings are only loaded.

    Raises:
        InputError: no data folder, or files missing in it.
    """
    if settings.data is None:
        raise InputError("--data", found="nothing", expected="a folder with images/cifar10 and weights")
    parts = [read("cifar10", settings.data, part) for part in ("train", "test")]
    if effort.pictures is not None:
        parts = [Pictures(p.images[: effort.pictures], p.labels[: effort.pictures], p.names) for p in parts]
    pictures, test = parts
    prepare = normalisation("cifar10")
    config = student_config(len(pictures), effort)
    teachers: dict[int, nn.Module] = {}
    accuracy: dict[int, float] = {}
    for depth in effort.teachers:
        teachers[depth] = fine_tune(depth, settings, pictures, prepare, effort)
        accuracy[depth] = evaluate(teachers[depth], test, prepare=prepare, device=settings.device).top1
    rows = methods(effort.teachers)
    jobs = [(seed, row) for seed in range(settings.seed, settings.seed + effort.seeds) for row in rows]
    found: dict[tuple[str, int | None], list[float]] = {row: [] for row in rows}
    rhos: dict[int, list[list[float]]] = {depth: [] for depth in effort.teachers}
    for seed, row in track(jobs, "dpk: students", len(jobs)):
        name, depth = row
        torch.manual_seed(seed)
        student = CifarResNet(8)
        teacher = copy.deepcopy(teachers[depth]) if depth else None
        distiller = Distiller(student, teacher, rows[row](), torch.zeros(2, 3, 32, 32), seed=seed)
        result = train(
            distiller,
            pictures,
            dataclasses.replace(config, seed=seed),
            settings.out / f"{name.replace(' ', '-').lower()}-{depth or 0}-seed{seed}",
            prepare=prepare,
            device=settings.device,
            label=f"dpk: {name} {depth or ''}",
        )
        found[row].append(evaluate(result.student, test, prepare=prepare, device=settings.device).top1)
        if name == "DPK" and depth:
            curve = [[v for k, v in record.items() if k.startswith("rho.")] for record in result.records]
            rhos[depth].append([statistics.fmean(values) for values in curve])
    return Reproduction(
        judge(found, rhos, effort.teachers),
        [accuracy_table(found, rhos)],
        [trend_picture(found, effort.teachers)],
        text=(
            f"ResNet-8 on CIFAR-10, {effort.epochs} epochs, {effort.seeds} seeds, last epoch. Teachers after "
            f"{effort.fine_tuning} more epochs on these pictures: "
            + ", ".join(f"ResNet-{depth} {value:.1f}" for depth, value in accuracy.items())
            + " percent."
        ),
    )


def student_config(samples: int, effort: Effort) -> TrainConfig:
    an_epoch = max(1, round(samples / effort.batch_size))
    return TrainConfig(
        steps=effort.epochs * an_epoch,
        batch_size=effort.batch_size,
        learning_rate=0.2,
        optimizer="sgd",
        weight_decay=5e-4,
        schedule="one-cycle",
        clip_norm=None,
        mixed_precision=effort.mixed_precision,  # pyright: ignore[reportArgumentType]
        checkpoint_every=10 * an_epoch,
    )


def fine_tune(depth: int, settings: Settings, pictures: Pictures, prepare: Normalise, effort: Effort) -> nn.Module:
    """A trained ResNet, trained further on these pictures; taken from the run folder if it is there."""
    assert settings.data is not None

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor], generator: torch.Generator) -> Tensor:
        return functional.cross_entropy(model(prepare(batch[0], generator)), batch[1])

    an_epoch = max(1, round(len(pictures) / effort.batch_size))
    config = dataclasses.replace(
        student_config(len(pictures), effort),
        steps=effort.fine_tuning * an_epoch,
        learning_rate=0.02,
        schedule="cosine",
        seed=settings.seed,
        log_every=an_epoch,
    )
    folder = Path(settings.out) / f"teacher-resnet{depth}"
    return loop.train(
        load_cifar_resnet(settings.data, depth),
        pictures,
        loss,
        config,
        folder,
        device=settings.device,
        label=f"dpk: ResNet-{depth}",
        provenance={"teacher": depth},
    ).model


def judge(
    found: Mapping[tuple[str, int | None], Sequence[float]],
    rhos: Mapping[int, Sequence[Sequence[float]]],
    teachers: Sequence[int],
) -> list[Claim]:
    """The claims that follow from the accuracies of the last epoch (means over the seeds) and from rho."""
    mean = {row: statistics.fmean(values) for row, values in found.items()}
    small, large = min(teachers), max(teachers)

    def told(*rows: tuple[str, int | None]) -> str:
        return ", ".join(f"{name} {depth or ''} {mean_and_error(found[name, depth])}" for name, depth in rows)

    constants = [(f"DPK rho {share:g}", large) for share in CONSTANTS]
    trend = [mean["DPK", depth] for depth in teachers]
    ends = {depth: [statistics.fmean(curve[k] for curve in curves) for k in (0, -1)] for depth, curves in rhos.items()}
    return [
        Claim(
            "C1",
            "DPK beats no distillation and plain feature regression; KD + DPK beats KD",
            "stated; no figure available",
            told(("CE", None), ("FitNet", large), ("DPK", large), ("KD", large), ("KD + DPK", large)),
            "DPK > CE, DPK > FitNet and KD + DPK > KD with the largest teacher",
            mean["DPK", large] > max(mean["CE", None], mean["FitNet", large])
            and mean["KD + DPK", large] > mean["KD", large],
        ),
        Claim(
            "C2",
            "the dynamic ratio is at least as good as the best constant one",
            "stated; no figure available",
            told(("DPK", large), *constants),
            "DPK >= each of rho 0, 0.25, 0.5, 0.75 with the largest teacher",
            mean["DPK", large] >= max(mean[row] for row in constants),
        ),
        Claim(
            "C3",
            "with larger teachers the student does not get worse",
            "student accuracy grows with the teacher's size; no figure available",
            told(*(("DPK", depth) for depth in teachers)) + f"; Spearman {rank_agreement(list(teachers), trend):.2f}",
            "Spearman's correlation of size and accuracy at least 0",
            rank_agreement(list(teachers), trend) >= 0,
        ),
        Claim(
            "C4",
            "rho falls during training and is larger for the larger teacher",
            "stated; no figure available",
            ", ".join(f"ResNet-{depth} {a:.2f} -> {b:.2f}" for depth, (a, b) in ends.items()),
            "falls with every teacher; ends higher with the largest than with the smallest",
            all(b < a for a, b in ends.values()) and ends[large][1] > ends[small][1],
        ),
    ]


def accuracy_table(
    found: Mapping[tuple[str, int | None], Sequence[float]], rhos: Mapping[int, Sequence[Sequence[float]]]
) -> Table:
    rows = []
    for (name, depth), values in found.items():
        curves = rhos.get(depth, ()) if name == "DPK" and depth else ()
        ends = [statistics.fmean(curve[k] for curve in curves) if curves else None for k in (0, -1)]
        rows.append((name, f"ResNet-{depth}" if depth else "", mean_and_error(values), *ends))
    return Table("students, top-1 after the last epoch", ("method", "teacher", "top-1", "rho first", "rho last"), rows)


def trend_picture(found: Mapping[tuple[str, int | None], Sequence[float]], teachers: Sequence[int]) -> Picture:
    """Accuracy over the teacher's depth."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5))
    axes = figure.subplots()
    for name in ("FitNet", "KD", "DPK"):
        axes.plot(teachers, [statistics.fmean(found[name, depth]) for depth in teachers], marker="o", label=name)
    axes.set_xlabel("layers of the teacher")
    axes.set_ylabel("student's top-1, percent")
    axes.legend()
    axes.grid(alpha=0.3)
    return Picture.of_figure("teacher size", figure)
