"""The claims of the paper re-tested (arXiv 2401.01543; specification, section 4): three seeds, mean and spread.

The criteria were fixed before the measurement. tiny: noisy handwritten digits, six searchable layers; small: CIFAR-10
with a ResNet-20 on a GPU. The differences that the paper reports are around one point, so tiny can decide the first
claims only; what it shows of the others is shown as it is.
"""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from papercore.errors import InputError
from papercore.report import Picture, Table
from papercore.reproduce import Claim, Paper, Reproduction, Settings

from oneshot_mpq.checkpoint import load_supernet
from oneshot_mpq.inspection import REMEDIES
from oneshot_mpq.reference import method_difference
from oneshot_mpq.study import Setting, run_study

SEEDS = 3

TINY = Setting(
    dataset="digits",
    model="digits",
    float_epochs=25,
    epochs=16,
    batch_size=100,
    configurations=20,
    recalibration=1000,
    search_images=200,
    method="greedy",
    finetuning=4,
    workers=2,
    device="cpu",
)
SMALL = Setting(
    dataset="cifar10",
    model="cifar-resnet20",
    float_epochs=4,
    epochs=12,
    batch_size=512,
    configurations=20,
    recalibration=7000,
    search_images=5000,
    method="greedy",
    finetuning=5,
    workers=1,
)

FULL = (
    "The paper trains ResNet-18, MobileNetV2 and EfficientNet-Lite0 on ImageNet for 150 epochs of four passes a step "
    "on four A100 GPUs, and searches at the cost of W4A4 (ResNet-18: 71.0 % top-1 at 31.6 G bit operations)."
)


def run(settings: Settings) -> Reproduction:
    """The claims at the scale that is asked for."""
    if settings.scale == "tiny":
        return study(settings, TINY)
    if settings.data is None:
        raise InputError("--data", found="nothing", expected="a folder with the CIFAR-10 pictures")
    return study(settings, dataclasses.replace(SMALL, data=settings.data, device=settings.device))


def study(settings: Settings, setting: Setting, seeds: int = SEEDS) -> Reproduction:
    """Trains, searches, judges."""
    chosen = list(range(settings.seed, settings.seed + seeds))
    settings.say(f"oneshot-mpq: {seeds} seeds, {len(REMEDIES)} trainings each")
    floats, found = run_study(setting, chosen, settings.out)
    net = load_supernet(settings.out / f"seed{chosen[0]}" / "both")
    splits = setting.project(chosen[0]).splits()
    items = [splits.plain[i] for i in range(32)]
    batch = torch.stack([x for x, _ in items]), torch.tensor([int(y) for _, y in items])
    differences = method_difference(net, *batch)
    figures = Figures(floats, found)
    return Reproduction(
        [*figures.claims(), method_claim(differences)],
        [accuracy_table(figures), remedy_table(figures), configuration_table(figures)],
        [remedy_picture(figures)],
        text=describe(setting, seeds),
    )


def describe(setting: Setting, seeds: int) -> str:
    data = "handwritten digits with noise" if setting.dataset == "digits" else setting.dataset
    error = {"digits": 1.0}.get(setting.dataset, 0.3)
    return (
        f"{setting.model} on {data}: {setting.float_epochs} float epochs, {setting.epochs} supernet epochs, "
        f"{seeds} seeds (splits, weights, paths). Every configuration is measured on the test images with batch-norm "
        f"statistics of its own; the standard error of one accuracy is about {error} point. {FULL}"
    )


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean and standard deviation."""
    mean = f"{statistics.fmean(values):+.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


@dataclasses.dataclass(frozen=True)
class Figures:
    """What was measured: float accuracy by seed, the rest by remedy and seed."""

    floats: Mapping[int, float]
    found: Mapping[str, Mapping[int, Mapping[str, Any]]]

    def differences(self, key: str) -> list[float]:
        """In points, by seed."""
        both, plain = self.found["both"], self.found["neither"]
        values = {
            "W4A4": lambda s: both[s]["uniform"]["4"] - self.floats[s],
            "W6A6": lambda s: both[s]["uniform"]["6"] - self.floats[s],
            "searched": lambda s: both[s]["searched"] - both[s]["uniform"]["3"],
            "fine-tuning": lambda s: both[s]["fine-tuned"] - both[s]["searched"],
            **{
                remedy: lambda s, remedy=remedy: self.found[remedy][s]["random"] - plain[s]["random"]
                for remedy in REMEDIES
            },
        }
        return [values[key](seed) for seed in self.floats]

    def claims(self) -> list[Claim]:
        """In the order of the specification."""
        four, six = self.differences("W4A4"), self.differences("W6A6")
        searched, tuned = self.differences("searched"), self.differences("fine-tuning")
        both = self.found["both"]
        excess = max(both[seed]["cost"] / both[seed]["budget"] for seed in self.floats)
        mean = statistics.fmean

        def remedy(number: str, name: str, what: str, paper: str, least: float) -> Claim:
            values = self.differences(name)
            return Claim(
                number,
                what,
                paper,
                f"{spread(values)} points, mean of random configurations costing <= W3A3",
                f"mean > {least:g}",
                mean(values) > least,
            )

        return [
            Claim(
                "C1",
                "uniform widths of the supernet reach the float network",
                "W4-level ResNet-18 71.0 %, float 70.5 %",
                f"W4A4 {spread(four)}, W6A6 {spread(six)} points to the float network",
                "both means >= -1.5",
                min(mean(four), mean(six)) >= -1.5,
            ),
            Claim(
                "C2",
                "the search keeps its budget and does not lose against the uniform width",
                "31.6 G at a budget of 33.9 G",
                f"cost at most {excess:.3f} of W3A3; accuracy {spread(searched)} points to W3A3",
                "cost <= 1 always, mean >= -2",
                excess <= 1 and mean(searched) >= -2,
            ),
            Claim(
                "C4",
                "the searched network beats uniform W3A3 of the same supernet at no more cost",
                "no figure of its own",
                f"{spread(searched)} points",
                "mean > 0",
                mean(searched) > 0,
            ),
            remedy("C5", "scheduler", "the scheduler alone adds", "+0.8 points", 0.0),
            remedy("C6", "mitigation", "the distortion mitigation alone adds", "+0.4 points", 0.0),
            remedy("C7", "both", "both together add", "+1.2 points", 0.3),
            Claim(
                "C8",
                "fine-tuning the found network alone gains little",
                "none is needed",
                f"{spread(tuned)} points",
                "mean < 1",
                mean(tuned) < 1,
            ),
        ]


def method_claim(differences: Mapping[str, float]) -> Claim:
    """C3: the fast implementation against loops written from the text, on the trained network."""
    worst = max(differences.values())
    told = ", ".join(f"{name} {value:.0e}" for name, value in differences.items())
    return Claim(
        "C3",
        "turbulence, freeze events, distortion and loss are what the text says",
        "the authors' code (its own numbers are held in the tests)",
        f"largest relative difference to slow loops: {told}",
        "<= 1e-9 in float64",
        worst <= 1e-9,
    )


def accuracy_table(figures: Figures) -> Table:
    rows = []
    for seed, exact in figures.floats.items():
        both = figures.found["both"][seed]
        uniform = [both["uniform"][str(b)] for b in (2, 3, 4, 6)]
        rows.append((seed, exact, *uniform, both["searched"], both["cost"] / both["budget"], both["fine-tuned"]))
    columns = ("seed", "float", "W2A2", "W3A3", "W4A4", "W6A6", "searched", "its cost / W3A3", "fine-tuned")
    return Table("test accuracy (%) of the supernet with both remedies", columns, rows)


def remedy_table(figures: Figures) -> Table:
    rows = []
    for remedy, seeds in figures.found.items():
        values = [result["random"] for result in seeds.values()]
        low = [result["uniform"]["2"] for result in seeds.values()]
        three = [result["uniform"]["3"] for result in seeds.values()]
        rows.append((remedy, *(spread(v).lstrip("+") for v in (values, low, three))))
    return Table(
        "mean ± standard deviation over the seeds, accuracy (%)",
        ("training", "random configurations <= W3A3", "W2A2", "W3A3"),
        rows,
    )


def configuration_table(figures: Figures) -> Table:
    rows = []
    for seed, result in figures.found["both"].items():
        weights, activations = result["bits"]
        pairs = " ".join(f"{w}/{a}" for w, a in zip(weights, activations, strict=True))
        rows.append((seed, pairs))
    return Table("bits found (weight/activation by layer)", ("seed", "bits"), rows)


def remedy_picture(figures: Figures) -> Picture:
    """Random configurations by training, every seed a point."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.add_subplot()
    for position, seeds in enumerate(figures.found.values()):
        values = [result["random"] for result in seeds.values()]
        axes.plot([position] * len(values), values, "o", alpha=0.6)
        axes.plot([position - 0.2, position + 0.2], [statistics.fmean(values)] * 2, "k-")
    axes.set_xticks(range(len(figures.found)), list(figures.found))
    axes.set_ylabel("accuracy (%)")
    axes.grid(alpha=0.3)
    return Picture.of_figure(
        "Random configurations at the cost of W3A3", figure, "A point a seed, the line their mean."
    )


PAPER = Paper(
    package="oneshot-mpq",
    title="Retraining-free model quantization via one-shot weight-coupling learning",
    reference="arXiv 2401.01543",
    scales=("tiny", "small"),
    run=run,
)
