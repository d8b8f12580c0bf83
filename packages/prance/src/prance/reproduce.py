"""The claims of PRANCE that a tiny network can decide, on handwritten digits (specification 4.3).

A meta-network of 8 blocks on 17 tokens is trained, then a selector with PPO and result-to-go; the comparison is with
random static configurations of equal MACs. Nothing was chosen by what it does to a claim.
"""

import dataclasses
import multiprocessing
import os
import statistics
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from papercore.errors import InputError
from papercore.progress import track
from papercore.report import Picture, Table
from papercore.reproduce import Claim, Paper, Reproduction, Settings
from papercore.training import TrainConfig

from prance.adaptive import AdaptiveViT
from prance.data import load
from prance.decision import Decision
from prance.evaluate import correct_answers, evaluate
from prance.macs import Geometry
from prance.ppo import PPOConfig, RewardConfig
from prance.selection import Selection, select
from prance.selector import Selector
from prance.space import SearchSpace
from prance.stages import PretrainConfig, pretrain
from prance.supernet import MetaViT

SEEDS = 3
SPACE = SearchSpace((24, 32, 40, 48), (1, 2, 3), group=2, depth=8, heads=3, head_dim=16)
TRAIN = TrainConfig(steps=600, batch_size=64, learning_rate=2e-3, schedule="one-cycle", weight_decay=0.05)
ROLLOUTS, ROLLOUT_IMAGES, STATIC = 60, 256, 12
PPO = PPOConfig(actor_learning_rate=1e-3)
REWARDS = RewardConfig(flops_coef=0.6)
MODE = "prune_merge"


@dataclasses.dataclass(frozen=True)
class Seed:
    """What one seed gave."""

    seed: int
    largest: float
    """accuracy of the largest subnet"""
    selector: float
    share: float
    """mean MACs of the selector over the largest subnet's"""
    kept: float
    decisions: int
    static: tuple[float, ...]
    """accuracies of random static configurations of equal MACs"""
    delayed: tuple[float, float]
    """accuracy and share of a selector that was paid at the end only"""
    difference: float
    """largest difference of logits between the four ways of running, over all test images"""
    spent: tuple[int, ...]
    """MACs of every test image"""


def run(settings: Settings) -> Reproduction:
    """The claims at the scale that is asked for."""
    if settings.scale != "tiny":
        raise InputError("--scale", found=settings.scale, expected="tiny")
    seeds = range(settings.seed, settings.seed + SEEDS)
    jobs = [(settings.out, seed) for seed in seeds]
    # the network is too small for threads: a process for each of two cores instead
    with ProcessPoolExecutor(min(2, os.cpu_count() or 1), multiprocessing.get_context("spawn")) as pool:
        found = list(track(pool.map(one_seed, jobs), "prance: seeds", len(jobs)))
    return Reproduction(
        judge(found),
        [table(found)],
        [histogram(found)],
        text=(
            f"Digits in patches of 2, {TRAIN.steps} steps of the largest and one random subnet, {ROLLOUTS} rollouts of "
            f"{ROLLOUT_IMAGES} images. Result-to-go and a reward at the end are both in the table; the difference is "
            "too small here to judge."
        ),
    )


def one_seed(job: tuple[Path, int]) -> Seed:
    """Trains and measures one seed; finished parts are only loaded."""
    torch.set_num_threads(1)
    out, seed = job
    train, test = load("digits", None, "train"), load("digits", None, "test")
    torch.manual_seed(seed)
    net = MetaViT(SPACE, 10, image_size=8, patch_size=2, channels=1)
    config = dataclasses.replace(TRAIN, seed=seed)
    trained = pretrain(net, train, out / f"net-seed{seed}", config, PretrainConfig(), device="cpu")
    net = trained.model
    assert isinstance(net, MetaViT)
    target = correct_answers(net, train)
    results = {}
    for name, delayed in (("selector", False), ("delayed", True)):
        torch.manual_seed(seed)
        selector = Selector(SPACE, net.tokens, MODE)
        method = Selection(net, selector, PPO, REWARDS, delayed=delayed)
        folder = out / f"{name}-seed{seed}"
        kind = {"rollouts": ROLLOUTS, "images": ROLLOUT_IMAGES, "seed": seed, "device": "cpu", "method": method}
        chosen = select(net, selector, train, target, folder, **kind).model
        assert isinstance(chosen, Selector)
        results[name] = chosen.eval()
    model = AdaptiveViT(net, results["selector"])
    own, late = evaluate(model, test), evaluate(AdaptiveViT(net, results["delayed"]), test)
    largest = evaluate(AdaptiveViT(net, decision=Decision.largest(SPACE)), test)
    from prance.baselines import random_static

    configurations = random_static(Geometry.of(net), SPACE, MODE, own.macs, count=STATIC, seed=seed)
    static = tuple(
        evaluate(AdaptiveViT(net, decision=configurations[i]), test).accuracy for i in range(len(configurations))
    )
    logits = own.prediction.logits
    others = [
        AdaptiveViT(net, results["selector"], engine=engine)(test.images) for engine in ("masked", "bucketed", "sliced")
    ]
    difference = max(float((other.logits - logits).abs().max()) for other in others)
    return Seed(
        seed,
        largest.accuracy,
        own.accuracy,
        own.share,
        own.kept,
        own.distinct,
        static,
        (late.accuracy, late.share),
        difference,
        tuple(own.prediction.macs.tolist()),
    )


def judge(found: Sequence[Seed]) -> list[Claim]:
    """The claims that follow, means over the seeds."""
    gain = [100 * (s.selector - statistics.fmean(s.static)) for s in found]
    loss = [100 * (s.largest - s.selector) for s in found]
    share = [s.share for s in found]
    worst = max(s.difference for s in found)
    return [
        Claim(
            "C1",
            "decisions for every image beat the same cost for all",
            "no figure of its own",
            f"{spread(gain)} points above the mean of {STATIC} random static configurations of equal MACs",
            "mean at least 1 point",
            statistics.fmean(gain) >= 1,
        ),
        Claim(
            "C2",
            "far fewer MACs at little loss",
            "about -50 % FLOPs at no loss (ImageNet)",
            f"{100 * statistics.fmean(share):.1f} % of the largest subnet's MACs, {spread(loss)} points lost",
            "at most 35 % of the MACs and a mean loss of at most 3 points",
            statistics.fmean(share) <= 0.35 and statistics.fmean(loss) <= 3,
        ),
        Claim(
            "C3",
            "masked, sliced, packed and bucketed give one answer for every image",
            "the published code's paths differ by 0.13 to 1.4",
            f"largest difference of a logit {worst:.1e} over all test images",
            "at most 1e-4",
            worst <= 1e-4,
        ),
    ]


def spread(values: Sequence[float]) -> str:
    """ "1.2 ± 0.4": mean and standard deviation."""
    return f"{statistics.fmean(values):.1f} ± {statistics.stdev(values) if len(values) > 1 else 0.0:.1f}"


def table(found: Sequence[Seed]) -> Table:
    columns = (
        "seed",
        "largest %",
        "selector %",
        "share of MACs",
        "tokens kept",
        "decisions",
        "static mean %",
        "static best %",
        "reward at the end %",
        "its share",
    )
    rows: list[tuple[Any, ...]] = [
        (
            s.seed,
            100 * s.largest,
            100 * s.selector,
            s.share,
            s.kept,
            s.decisions,
            100 * statistics.fmean(s.static),
            100 * max(s.static),
            100 * s.delayed[0],
            s.delayed[1],
        )
        for s in found
    ]
    return Table("digits, test images", columns, rows)


def histogram(found: Sequence[Seed]) -> Picture:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    for s in found:
        axes.hist([value / 1e6 for value in s.spent], bins=30, histtype="step", label=f"seed {s.seed}")
    axes.set(xlabel="million MACs of an image", ylabel="test images")
    axes.legend()
    return Picture.of_figure("MACs", figure, "What the selector spends on the test images.")


PAPER = Paper(
    "prance",
    "Joint token-optimisation and structural channel-pruning for adaptive ViT inference",
    "arXiv 2407.05010",
    ("tiny",),
    run,
)
