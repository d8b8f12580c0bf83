"""What the claims are judged by: supernets with and without the two remedies, and what can be found in them.

Every part is a function of its setting and seed alone, writes its result beside its run, and is taken from there when
it is asked for again. The parts run side by side in processes of their own.
"""

import dataclasses
import json
import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from papercore.rundir import write_json
from torch.utils.data import DataLoader

from oneshot_mpq.bitconfig import BitConfig
from oneshot_mpq.checkpoint import load_supernet
from oneshot_mpq.data import Name, Splits
from oneshot_mpq.finetune import finetune
from oneshot_mpq.inspection import REMEDIES
from oneshot_mpq.recalibrate import recalibrate
from oneshot_mpq.search import search
from oneshot_mpq.supernet import Supernet
from oneshot_mpq.validation import accuracy
from oneshot_mpq.workflow import Project, float_network, train_supernet


@dataclasses.dataclass(frozen=True)
class Setting:
    """How large the study is."""

    dataset: Name
    model: str
    float_epochs: int
    epochs: int
    batch_size: int
    configurations: int
    """random ones at or below the cost of W3A3, of which the mean accuracy is taken"""
    recalibration: int
    """training images behind the batch-norm statistics"""
    search_images: int
    """images that the search measures on"""
    method: Literal["greedy", "ilp", "evolution", "random"]
    """of the search"""
    finetuning: int
    """epochs"""
    workers: int
    """processes side by side"""
    data: Path | None = None
    limit: int | None = None
    device: str = "auto"
    bits: tuple[int, ...] = (2, 3, 4, 5, 6)

    def project(self, seed: int) -> Project:
        return Project(
            self.model,
            self.dataset,
            self.data,
            bits=self.bits,
            float_epochs=self.float_epochs,
            seed=seed,
            limit=self.limit,
        )

    def described(self) -> dict[str, Any]:
        """What a stored result depends on."""
        left_out = ("workers", "data", "device")
        return json.loads(json.dumps({k: v for k, v in dataclasses.asdict(self).items() if k not in left_out}))


class Job(NamedTuple):
    setting: Setting
    out: Path
    seed: int
    remedy: str


def under_budget(net: Supernet, budget: float, generator: torch.Generator) -> BitConfig:
    """A random configuration of at most `budget` G bit operations: drawn uniformly, then lowered bit by bit, each time
    a random one, until it fits."""
    layers = list(net.layers.values())
    choices = [c for layer in layers for c in (layer.weight_choices, layer.act_choices)]
    levels = [int(torch.randint(len(c), (), generator=generator)) for c in choices]

    def config() -> BitConfig:
        bits = [c[i] for c, i in zip(choices, levels, strict=True)]
        return BitConfig.of(net, bits[::2], bits[1::2])

    found = config()
    while (found.bitops_G or 0) > budget:
        lower = [i for i, level in enumerate(levels) if level > 0]
        levels[lower[int(torch.randint(len(lower), (), generator=generator))]] -= 1
        found = config()
    return found


def measure_config(net: Supernet, config: BitConfig, splits: Splits, images: int) -> float:
    """Top-1 accuracy on the test images in percent, after the batch norms have seen training images."""
    net.set_bits(config)
    recalibrate(net, DataLoader(splits.plain, 500), images=images)
    return accuracy(net, DataLoader(splits.test, 1000))


def run_float(job: Job) -> float:
    """Trains the float network of a seed; its accuracy on the test images."""
    torch.set_num_threads(1)
    setting, out, seed, _ = job
    splits = setting.project(seed).splits()
    model, _ = float_network(setting.project(seed), splits, out / "float", device=setting.device)
    return accuracy(model, DataLoader(splits.test, 1000))


def run_supernet(job: Job) -> dict[str, Any]:
    """Trains a supernet and measures it; the searches and the fine-tuning are done with both remedies only."""
    torch.set_num_threads(1)
    setting, out, seed, remedy = job
    folder, stored = out / remedy, out / remedy / "measured.json"
    if stored.exists():
        record = json.loads(stored.read_text())
        if record["setting"] == setting.described():
            return record["result"]
    project = setting.project(seed)
    config = project.train_config(
        epochs=setting.epochs, batch_size=setting.batch_size, log_every=50, checkpoint_every=400, **REMEDIES[remedy]
    )
    _, splits = train_supernet(
        project,
        config,
        folder,
        device=setting.device,
        float_out=out / "float",
        label=f"oneshot-mpq: seed {seed}, {remedy}",
    )
    net = load_supernet(folder, device=pick(setting.device))

    def measure(config: BitConfig) -> float:
        return measure_config(net, config, splits, setting.recalibration)

    uniform = {b: BitConfig.uniform(net, b, b) for b in (2, 3, 4, 6)}
    budget = uniform[3].bitops_G or 0.0
    generator = torch.Generator().manual_seed(seed)  # the same configurations for all remedies
    random = [measure(under_budget(net, budget, generator)) for _ in range(setting.configurations)]
    result: dict[str, Any] = {"random": sum(random) / len(random)}
    result["uniform"] = {str(b): measure(c) for b, c in uniform.items()}
    if remedy == "both":
        result |= _search(job, net, splits, measure, budget)
    write_json(stored, {"setting": setting.described(), "result": result})
    return result


def _search(
    job: Job, net: Supernet, splits: Splits, measure: Callable[[BitConfig], float], budget: float
) -> dict[str, Any]:
    """The best configuration found on the search images, on the test images; then fine-tuned alone."""
    setting, out, seed, remedy = job
    count = min(setting.search_images, len(splits.search))  # pyright: ignore[reportArgumentType]
    images = torch.utils.data.Subset(splits.search, range(count))
    found = search(net, DataLoader(images, 500), {"bitops_G": budget}, setting.method, seed=seed)
    config = found.config
    result: dict[str, Any] = {
        "budget": budget,
        "searched": measure(config),
        "cost": net.cost(config).bitops_G,
        "bits": [list(config.weight_bits), list(config.act_bits)],
    }
    finetune(
        net,
        config,
        splits.train,
        epochs=setting.finetuning,
        batch_size=setting.batch_size,
        out=out / remedy / "finetuning",
        seed=seed,
        device=setting.device,
        label=f"oneshot-mpq: seed {seed}, fine-tuning",
    )
    net.to(pick(setting.device))
    return result | {"fine-tuned": measure(config)}


def pick(device: str) -> str:
    """ "auto" resolved."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def run_study(
    setting: Setting, seeds: Sequence[int], out: Path
) -> tuple[Mapping[int, float], Mapping[str, Mapping[int, Mapping[str, Any]]]]:
    """Float accuracy by seed, and what was measured by remedy and seed."""
    jobs = {(seed, remedy): Job(setting, out / f"seed{seed}", seed, remedy) for seed in seeds for remedy in REMEDIES}
    firsts = [jobs[seed, "both"] for seed in seeds]
    if setting.workers == 1:
        floats = [run_float(job) for job in firsts]
        results = [run_supernet(job) for job in jobs.values()]
    else:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(setting.workers, mp_context=context) as pool:
            floats = list(pool.map(run_float, firsts))
            results = list(pool.map(run_supernet, jobs.values()))
    found = dict(zip(jobs, results, strict=True))
    by_remedy = {remedy: {seed: found[seed, remedy] for seed in seeds} for remedy in REMEDIES}
    return dict(zip(seeds, floats, strict=True)), by_remedy
