"""The claims of TMPQ-DM, re-tested (arXiv 2404.09532): R1 to R3 on a UNet trained here, R4 to R6 on synthetic layers.

R1  searched timesteps beat the quadratic and the uniform list, at equal number of steps and equal bits
R2  searched bits beat uniform bits, at equal BitOps and on the same list
R3  searching both beats either, at equal BitOps and equal number of scored candidates
R4  splitting decoder shortcuts pays where the half with the small range matters
R5  a mixture taken from the solver is as good as the same mixture calibrated by itself
R6  learned rounding and steps beat rounding to nearest and whole ranges

The paper's tables of figures were not at hand: the column says so. The criteria are fixed in the code below and were
fixed before the measurement.
"""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from papercore.errors import InputError
from papercore.report import Picture, Table
from papercore.reproduce import Claim, Paper, Reproduction, Settings
from torch import Tensor

from tmpqdm.calibration import collect_calibration, trajectory
from tmpqdm.cost import CostModel
from tmpqdm.groups import TimestepGroups
from tmpqdm.joint import SearchConfig, SearchResult, find
from tmpqdm.loading import load_model, load_scheduler
from tmpqdm.report import bits_picture
from tmpqdm.scores import FrechetScore, frechet_score
from tmpqdm.sensitivity import recommended_bits, sweep
from tmpqdm.solver import PrecisionSolver
from tmpqdm.space import Budget
from tmpqdm.synthetic import SKIP_WEIGHTS, learned_gain, mixture_errors, split_gain
from tmpqdm.train import CIFAR10, DIGITS, reduced, train_unet

UNKNOWN = "figures not at hand"


@dataclasses.dataclass(frozen=True)
class Effort:
    """How much is computed."""

    train_steps: int
    bits: tuple[int, ...]
    budget: int
    """bits whose uniform cost is the budget"""
    steps: int
    """visited timesteps"""
    population: int
    generations: int
    images: int
    """pictures of a score in the search"""
    check_images: int
    """pictures of a final score"""
    check_seeds: int
    """final scores, averaged"""
    calibration: int
    """trajectories"""
    sensitivity: int
    """calibration inputs of the sweep"""
    method: Literal["minmax", "adaround"] = "minmax"
    iterations: int = 0
    """of rounding and of steps, for every unit and bit-width"""
    mixture_iterations: int = 60
    """of R5"""


TINY = Effort(600, (8, 6, 5, 4), 5, 5, 10, 4, 300, 1200, 1, 16, 96)
SMALL = Effort(10000, (8, 7, 6, 5), 6, 10, 20, 8, 2048, 10000, 3, 32, 256, "adaround", 200, 200)


def run(settings: Settings) -> Reproduction:
    """The claims at the scale that is asked for."""
    return run_small(settings) if settings.scale == "small" else run_tiny(settings)


def run_tiny(settings: Settings, effort: Effort = TINY) -> Reproduction:
    """Handwritten digits, features of a small perceptron."""
    folder = settings.out / f"model-seed{settings.seed}"
    config = dataclasses.replace(reduced(DIGITS, effort.train_steps), seed=settings.seed)
    train_unet(folder, "digits", config, device=settings.device, label="tmpqdm: training the digits UNet")
    return study(settings, folder, effort, perceptron_features, "digits", {})


def run_small(settings: Settings, effort: Effort = SMALL) -> Reproduction:
    """CIFAR-10, features of a ResNet-56 trained on its labels.

    Raises:
        InputError: no data folder, or files missing in it.
    """
    if settings.data is None:
        raise InputError("--data", found="nothing", expected="a folder with images/cifar10 and weights")
    from papercore.data.cifar import cifar
    from papercore.data.cifar_resnet import CifarFeatures

    device = _device(settings.device)
    features = CifarFeatures(settings.data, device)
    folder = settings.out / f"model-seed{settings.seed}"
    config = dataclasses.replace(reduced(CIFAR10, effort.train_steps), seed=settings.seed)
    if device == "cpu":
        config = dataclasses.replace(config, mixed_precision="no")
    train_unet(folder, "cifar10", config, data=settings.data, device=settings.device, label="tmpqdm: training the UNet")
    reference = cifar(settings.data, "test").images
    return study(settings, folder, effort, features, reference, {"batch_size": 512})


@functools.cache
def _perceptron() -> Any:
    import warnings

    from sklearn.datasets import load_digits
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPClassifier

    bunch: Any = load_digits()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # 60 iterations are what the features are defined by
        return MLPClassifier((48,), max_iter=60, random_state=0).fit(bunch.data / 16, bunch.target)


def perceptron_features(images: Tensor) -> np.ndarray:
    """48 hidden activations of scikit-learn's perceptron fitted to the digits (16 grey levels as 0..1)."""
    network = _perceptron()
    x = images.flatten(1).double().numpy() / 255
    return np.maximum(x @ network.coefs_[0] + network.intercepts_[0], 0)


def study(
    settings: Settings, folder: Path, effort: Effort, features: Any, reference: Any, options: Mapping[str, Any]
) -> Reproduction:
    """Calibrates, searches three times, scores everything on fresh noise, judges."""
    device, seed = _device(settings.device), settings.seed
    model: Any = load_model(folder).to(device)
    scheduler = load_scheduler(folder)
    settings.say("tmpqdm: calibrating")
    data = collect_calibration(model, scheduler, samples=effort.calibration, seed=seed)
    solver = PrecisionSolver.from_model(model, bits=effort.bits)
    solver.calibrate(
        data, method=effort.method, weight_iters=effort.iterations, act_iters=effort.iterations, seed=seed,
        rounding_rate=1e-2, step_rate=1e-3,
    )  # fmt: skip
    cost = CostModel.trace(model, splits=solver.splits)
    groups = TimestepGroups.quadratic(effort.steps)
    score = frechet_score(
        model, scheduler, features=features, reference=reference, images=effort.images, seed=seed, **options
    )
    sensitivity = sweep(solver, data, samples=effort.sensitivity, label="tmpqdm: sensitivities")
    budget = Budget(bitops_per_step=f"uniform:{effort.budget}")
    config = SearchConfig(
        population=effort.population, generations=effort.generations, top_k=max(2, effort.population // 3),
        finalists=3, seed=seed,
    )  # fmt: skip
    found: dict[str, SearchResult] = {}
    for mode in ("timesteps", "bits", "joint"):
        found[mode] = find(
            solver, groups, cost, score, budget, config=config, sensitivity=sensitivity, mode=mode, name=mode,
            resume=settings.out / f"search-seed{seed}.log",
        )  # fmt: skip

    def fresh(timesteps: Any, bits: Any) -> float:
        """Mean over noise that no search has seen; None for bits: full precision."""
        values = []
        for check in range(effort.check_seeds):
            images, fresh_seed = effort.check_images, seed + 1000 + check
            if bits is None:
                with solver.full_precision() as network:
                    values.append(score(network, timesteps, images=images, seed=fresh_seed).value)
            else:
                solver.set_bits(bits)
                values.append(score(solver.network, timesteps, images=images, seed=fresh_seed).value)
        return sum(values) / len(values)

    quadratic, uniform = list(groups.first()), trajectory(effort.steps, 1000, "uniform")
    level = solver.uniform(effort.budget)
    limit = cost.bitops(level)
    knapsack = recommended_bits(solver, cost, sensitivity, bitops=limit)
    settings.say("tmpqdm: final scores")
    cases: dict[str, tuple[list[int], Any]] = {
        "full precision, quadratic list": (quadratic, None),
        "full precision, uniform list": (uniform, None),
        "full precision, searched list": (list(found["timesteps"].plan.timesteps), None),
        **{f"uniform {b} bits, quadratic list": (quadratic, solver.uniform(b)) for b in effort.bits},
        f"uniform {effort.budget} bits, uniform list": (uniform, level),
        f"uniform {effort.budget} bits, searched list": (list(found["timesteps"].plan.timesteps), level),
        "bits from sensitivities, quadratic list": (quadratic, knapsack),
        "searched bits, quadratic list": (quadratic, found["bits"].plan.bits),
        "both searched": (list(found["joint"].plan.timesteps), found["joint"].plan.bits),
    }
    rows, values = [], {}
    for name, (timesteps, bits) in cases.items():
        values[name] = fresh(timesteps, bits)
        each = cost.full_precision if bits is None else cost.bitops(bits)
        rows.append((name, values[name], each, each / limit, str(timesteps)))
    table = Table(
        "Frechet distance on fresh noise",
        ("setting", "distance", "BitOps/step", "of the budget", "timesteps"),
        rows,
    )
    claims = [*judge(values, effort.budget), *synthetic_claims(effort, seed)]
    candidates = effort.population * effort.generations
    text = (
        f"Budget: the BitOps of uniform {effort.budget} bits; {effort.steps} steps; {candidates} scored candidates a "
        f"search of {effort.images} pictures each; final distances: mean of {effort.check_seeds} draws of "
        f"{effort.check_images} pictures to {score.reference.count} real ones. Only distances of equal numbers of "
        "pictures in equal features can be compared: these are no FIDs."
    )
    return Reproduction(
        claims,
        [table],
        [front(found, score), bits_picture(found["joint"].plan.bits, "Bits of the joint plan")],
        text,
    )


def judge(values: Mapping[str, float], budget: int) -> list[Claim]:
    """R1 to R3 from the distances."""
    quadratic = values[f"uniform {budget} bits, quadratic list"]
    uniform = values[f"uniform {budget} bits, uniform list"]
    times = values[f"uniform {budget} bits, searched list"]
    bits, both = values["searched bits, quadratic list"], values["both searched"]
    return [
        Claim(
            "R1",
            "searched timesteps beat the quadratic and the uniform list",
            UNKNOWN,
            f"FD searched {times:.3g}, quadratic {quadratic:.3g}, uniform {uniform:.3g} ({budget} bits)",
            "searched <= 0.75 x quadratic and < uniform",
            times <= 0.75 * quadratic and times < uniform,
        ),
        Claim(
            "R2",
            "searched bits beat uniform bits of equal BitOps",
            UNKNOWN,
            f"FD searched {bits:.3g}, uniform {quadratic:.3g} (quadratic list)",
            "searched <= 0.7 x uniform",
            bits <= 0.7 * quadratic,
        ),
        Claim(
            "R3",
            "searching both beats either alone, from a start by sensitivities",
            UNKNOWN,
            f"FD both {both:.3g}, timesteps {times:.3g}, bits {bits:.3g}",
            "both < timesteps and both < bits",
            both < times and both < bits,
        ),
    ]


def synthetic_claims(effort: Effort, seed: int) -> list[Claim]:
    """R4 to R6."""
    gains = [split_gain(weight, seed=seed) for weight in SKIP_WEIGHTS]
    mixture = mixture_errors(iterations=effort.mixture_iterations, seed=seed)
    learned = learned_gain(4, seed=seed)
    shown = ", ".join(f"{w:g}: {gain:.3g}" for w, gain in zip(SKIP_WEIGHTS, gains, strict=True))
    return [
        Claim(
            "R4",
            "splitting a shortcut lowers its error where the small-range half matters",
            "no figure of its own",
            f"error unsplit / split at 6 bits, by weight of the skip half: {shown}",
            "> 1.5 at weight 1, > 10 at 4 and above",
            gains[1] > 1.5 and min(gains[2:]) > 10,
        ),
        Claim(
            "R5",
            "one calibration serves all mixtures of bits",
            "no figure of its own",
            f"units' relative error: solver {mixture.solver:.4g}, calibrated alone {mixture.alone:.4g}, "
            f"uncalibrated {mixture.nearest:.4g}",
            "solver <= 1.05 x alone",
            mixture.solver <= 1.05 * mixture.alone,
        ),
        Claim(
            "R6",
            "learned rounding and steps beat nearest rounding and whole ranges",
            "no figure of its own",
            f"error ratio at 4 bits {learned:.3g}",
            "> 1.2",
            learned > 1.2,
        ),
    ]


def front(found: Mapping[str, SearchResult], score: FrechetScore) -> Picture:
    """The best search score after every candidate."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4))
    axes = figure.add_subplot()
    for mode, result in found.items():
        fitness = np.array([e.fitness for e in result.evaluations])
        axes.plot(np.arange(1, len(fitness) + 1), np.minimum.accumulate(fitness), label=mode)
    axes.set_xlabel("scored candidates")
    axes.set_ylabel(f"best Frechet distance ({score.images} pictures)")
    axes.set_yscale("log")
    axes.legend()
    return Picture.of_figure("Searches", figure, "On the searches' own noise.")


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name


PAPER = Paper(
    "tmpqdm",
    "TMPQ-DM: Joint Timestep Reduction and Quantization Precision Selection for Efficient Diffusion Models",
    "arXiv 2404.09532",
    ("tiny", "small"),
    run,
)
