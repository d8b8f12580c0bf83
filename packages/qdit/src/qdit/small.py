"""The claims at small scale: the CIFAR-10 DiT on one GPU (specification 4.2).

Rows: full precision, W8A8, W6A8, and W4A8 with {whole rows, groups of 128, groups of 64, sizes searched at the budget
of 128} x {rounding, GPTQ} x {dynamic, static}. Frechet distance in the pooled features of a trained ResNet-56 and the
inception score from its softmax, on `SAMPLES` pictures of `STEPS` steps against the 10 000 test pictures. What must
hold is the order of the paper's ablation.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from papercore.data.cifar import CLASSES, cifar
from papercore.data.cifar_resnet import CifarFeatures
from papercore.errors import InputError
from papercore.images import grid_png, images_to_uint8
from papercore.progress import track
from papercore.report import Picture, Table
from papercore.reproduce import Claim, Reproduction, Settings
from torch import Tensor, nn

from qdit.calibration import collect_calibration
from qdit.cifar10 import load_dit
from qdit.config import QDiTConfig
from qdit.convert import noise_error, quantize
from qdit.evaluate import Features, compare, describe
from qdit.granularity import SearchResult, frechet_fitness_in, noise_fitness, search_group_sizes, sizes_picture
from qdit.sampling import sample_many

MENU, BUDGET = (32, 64, 128, 256), 128


@dataclasses.dataclass(frozen=True)
class Effort:
    """How much is computed."""

    samples: int = 10_000
    """pictures for a Frechet distance"""
    steps: int = 50
    calibration: int = 256
    population: int = 20
    iterations: int = 10
    reranked: int = 10
    """best candidates of the search that are ranked again by Frechet distance"""
    reranking_samples: int = 2000


FULL = Effort()
TINY = Effort(samples=70, steps=2, calibration=16, population=2, iterations=2, reranked=1, reranking_samples=70)
"""does the code run at all?"""


def run(settings: Settings, effort: Effort = FULL) -> Reproduction:
    """Quantises in all settings, samples, measures, judges.

    Raises:
        InputError: no data folder, or files missing in it.
    """
    if settings.data is None:
        raise InputError("--data", found="nothing", expected="the folder with the CIFAR-10 DiT, ResNet-56 and pictures")
    device = (
        "cuda" if settings.device == "auto" and torch.cuda.is_available() else settings.device.replace("auto", "cpu")
    )
    model: nn.Module = load_dit(settings.data).to(device)  # pyright: ignore[reportArgumentType]
    space = CifarFeatures(settings.data, device)
    reference = describe(cifar(settings.data, "test").images, space)
    calibration = collect_calibration(model, samples=effort.calibration, steps=effort.steps, seed=settings.seed + 1)
    held_out = collect_calibration(model, samples=effort.calibration, steps=effort.steps, seed=settings.seed + 2)
    searched = search(settings, model, calibration, held_out, reference, space, effort)

    labels = torch.arange(effort.samples) % CLASSES["cifar10"]
    rows: dict[str, dict[str, Any]] = {}
    grids: dict[str, Tensor] = {}
    for name, config in track(grid(searched).items(), "qdit: settings", len(grid(searched))):
        quantised = model if config is None else quantize(model, config, calibration)
        images = images_to_uint8(
            sample_many(quantised, labels, effort.steps, guidance=1.5, seed=settings.seed, batch=500)
        )
        grids[name] = images[:20]
        error = 0.0 if config is None else noise_error(model, quantised, held_out)
        rows[name] = {"P": error, **compare(describe(images, space), reference)}
    columns = ("setting", "P", "frechet_distance", "inception_score", "precision", "recall")
    table = Table(
        "CIFAR-10, every setting",
        columns,
        [(name, *(row.get(column) for column in columns[1:])) for name, row in rows.items()],
    )
    chosen = ("full", "W8A8 g64", "W4A8 searched GPTQ dynamic", "W4A8 row nearest static")
    picture = Picture(
        "Samples from the same noise", grid_png(torch.cat([grids[name] for name in chosen]), 20), ", ".join(chosen)
    )
    text = f"{effort.samples} pictures of {effort.steps} steps, guidance 1.5, on {device}."
    return Reproduction(judge(rows), [table, searched.table], [picture, sizes_picture(searched.best)], text)


def grid(searched: SearchResult) -> Mapping[str, QDiTConfig | None]:
    """Every row's setting; None is full precision."""
    sizes: Mapping[str, Any] = {"row": None, "g128": 128, "g64": 64, "searched": searched.config_sizes}
    made: dict[str, QDiTConfig | None] = {
        "full": None,
        "W8A8 g64": QDiTConfig(8, 8, 64, gptq=False),
        "W6A8 g64": QDiTConfig(6, 8, 64, gptq=False),
    }
    for label, size in sizes.items():
        for rounding in ("nearest", "GPTQ"):
            for act in ("static", "dynamic"):
                name = f"W4A8 {label} {rounding} {act}"
                made[name] = QDiTConfig(4, 8, size, act=act, gptq=rounding == "GPTQ")  # pyright: ignore[reportArgumentType]
    return made


def search(
    settings: Settings,
    model: nn.Module,
    calibration: Any,
    held_out: Any,
    reference: Features,
    space: CifarFeatures,
    effort: Effort,
) -> SearchResult:
    """The search on the error of the noise, its best ranked again by the Frechet distance of their samples."""
    labels = torch.arange(effort.reranking_samples) % CLASSES["cifar10"]
    return search_group_sizes(
        model,
        QDiTConfig(4, 8, BUDGET),
        noise_fitness(model, calibration),
        menu=MENU,
        limit=BUDGET,
        population=effort.population,
        top_k=10,
        iterations=effort.iterations,
        seed=settings.seed,
        storage=settings.out / "search.jsonl",
        calibration=calibration,
        held_out=noise_fitness(model, held_out),
        rerank=frechet_fitness_in(space, reference, labels, steps=effort.steps, guidance=1.5, seed=settings.seed + 3),
        reranked=effort.reranked,
    )


def judge(rows: Mapping[str, Mapping[str, Any]]) -> list[Claim]:
    """The order of the paper's ablation, and what needs no order."""
    fd = {name: row["frechet_distance"] for name, row in rows.items()}
    full = fd["full"]

    def claim(name: str, statement: str, paper: str, better: str, worse: str) -> Claim:
        measured = f"FD {better} {fd[better]:.4g}, {worse} {fd[worse]:.4g}"
        return Claim(name, statement, paper, measured, "first < second", fd[better] < fd[worse])

    plain, groups = "W4A8 row nearest static", "W4A8 g128 nearest static"
    dynamic = "W4A8 g128 GPTQ dynamic"
    return [
        claim("C1", "groups of 128 beat whole rows", "FID 225.5 to 13.8", groups, plain),
        claim("C2", "dynamic ranges beat static ones", "FID 13.8 to 6.64", dynamic, "W4A8 g128 GPTQ static"),
        claim("C3", "GPTQ beats rounding", "no figure of its own", dynamic, "W4A8 g128 nearest dynamic"),
        claim("C4", "searched sizes beat the uniform one", "FID 6.64 to 6.40", "W4A8 searched GPTQ dynamic", dynamic),
        Claim(
            "C5",
            "W8A8 and W6A8 are nearly lossless",
            "FID 5.31 full, 5.32 W6A8",
            f"FD full {full:.4g}, W8A8 {fd['W8A8 g64']:.4g}, W6A8 {fd['W6A8 g64']:.4g}",
            "W8A8 <= 1.05 x full and W6A8 <= 1.1 x full",
            fd["W8A8 g64"] <= 1.05 * full and fd["W6A8 g64"] <= 1.1 * full,
        ),
    ]
