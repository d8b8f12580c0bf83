"""Training a distiller on papercore's loop, and measuring a classifier.

(The module is not called `train`: it would hide the function in the package.)
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from papercore import training
from papercore.errors import InputError, WorkError
from papercore.rundir import RunDir, write_json
from papercore.training import TrainConfig
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from dpk import checkpoint
from dpk.distiller import Distiller
from dpk.dpk_method import DPK
from dpk.taps import unwrap

Prepare = Callable[[Tensor, torch.Generator | None], Tensor]
"""A batch of a data set's images, on the device -> what the networks take; with a generator it may augment."""


@dataclasses.dataclass(frozen=True)
class Metrics:
    """Of a classifier on a data set."""

    top1: float
    """percent"""
    top5: float
    """percent; with five or fewer classes 100"""
    loss: float
    """cross-entropy"""
    samples: int


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """A finished training."""

    student: nn.Module
    """in evaluation mode, on the CPU"""
    last: Metrics | None
    """after the last epoch; none without a test set"""
    best: tuple[float, int] | None
    """highest top-1 of any epoch and which, counted from 1. Chosen on the test set: it flatters."""
    records: list[dict[str, Any]]
    """the log: a line an epoch with the losses, rho and CKA by stage, top-1, learning rate, seconds"""
    seconds: float
    is_main: bool
    """whether this process is the one that writes files"""


def train(
    distiller: Distiller,
    dataset: Dataset[Any],
    config: TrainConfig,
    out: Path,
    *,
    test: Dataset[Any] | None = None,
    prepare: Prepare | None = None,
    device: str = "auto",
    resume: bool = True,
    label: str = "dpk train",
    provenance: Mapping[str, Any] | None = None,
) -> TrainResult:
    """Trains and leaves `student.safetensors`, `aux.safetensors`, `state.json`, `log.jsonl`, `metrics.json` and a
    checkpoint in `out`. Killed at any moment and called again, it goes on to the same bits.

    An epoch is the whole number of steps nearest to one pass over the data. `config.log_every` is replaced by it.

    Args:
        dataset: of (image, label), images of equal size.
        test: measured after every epoch.
        prepare: see `Prepare`; none: images are given to the networks as they are.
        provenance: further entries that a resumed run must share.

    Raises:
        InputError: no samples, a label out of range, another run in the folder.
        WorkError: loss or features not finite.
    """
    classes = distiller.taps[0].classes
    for part in (dataset, test):
        if part is not None:
            check_labels(part, classes)
    epoch_steps = max(1, round(len(dataset) / config.batch_size))  # pyright: ignore[reportArgumentType]
    config = dataclasses.replace(config, log_every=epoch_steps)
    method = _Distillation(epoch_steps, test, prepare)
    described = {
        "method": type(distiller.method).__name__,
        "pairs": [dataclasses.asdict(pair) for pair in distiller.pairs],
        "distiller_seed": distiller.seed,
    }
    try:
        result = training.train(
            distiller,
            dataset,
            method,
            config,
            out,
            device=device,
            resume=resume,
            label=label,
            provenance=described | dict(provenance or {}),
        )
    except WorkError:
        distiller.method.check()  # says more than that the loss is not finite
        raise
    distiller.method.check()
    student = unwrap(distiller.student).eval()
    last = evaluate(student, test, prepare=prepare, device=device) if test is not None and result.is_main else None
    best = (float(method.best[0]), int(method.best[1])) if test is not None else None
    if result.is_main:
        checkpoint.save(out, distiller, epoch=-(-config.steps // epoch_steps))
        if last is not None and best is not None:
            found = {"last": dataclasses.asdict(last), "best": {"top1": best[0], "epoch": best[1]}}
            write_json(Path(out) / "metrics.json", found)
    return TrainResult(student, last, best, RunDir(Path(out)).records(), result.seconds, result.is_main)


class _Distillation(training.Method):
    """The distiller's losses in papercore's loop."""

    def __init__(self, epoch_steps: int, test: Dataset[Any] | None, prepare: Prepare | None) -> None:
        self.epoch_steps, self.test, self.prepare = epoch_steps, test, prepare
        self.best = torch.tensor([-1.0, 0.0], dtype=torch.float64)
        """highest top-1 and its epoch, counted from 1"""
        self.number: int | None = None
        self.seen: dict[str, Tensor] = {}
        self.images: Tensor | None = None
        self.begun = time.monotonic()

    def begin_step(self, model: nn.Module, step: int) -> None:
        number = step // self.epoch_steps
        if number != self.number:
            assert isinstance(model, Distiller)
            model.epoch(number)
            self.number, self.begun = number, time.monotonic()

    def losses(self, model: nn.Module, batch: Any, generator: torch.Generator) -> Iterator[Tensor]:
        images, targets = batch
        if self.prepare is not None:
            images = self.prepare(images, generator)
        out = model(images, targets, generator=generator)
        self.seen = {f"loss.{name}": loss.detach() for name, loss in out.losses.items()}
        inner = unwrap(model)
        assert isinstance(inner, Distiller)
        names = [pair.student for pair in inner.pairs]
        for name, value in out.info.items():
            parts = zip(names, value, strict=True) if value.ndim else (("", value),)
            self.seen |= {f"{name}.{part}".rstrip("."): entry for part, entry in parts}
        yield out.total

    def after_step(self, model: nn.Module, step: int) -> Mapping[str, float | Tensor]:
        done = step + 1
        if done % self.epoch_steps or self.test is None:
            return self.seen
        assert isinstance(model, Distiller)
        model.method.check()
        epoch = done // self.epoch_steps
        report: dict[str, float | Tensor] = {**self.seen, "seconds": time.monotonic() - self.begun}
        if torch.distributed.is_initialized() and torch.distributed.get_rank():
            return report
        device = str(next(model.student.parameters()).device)
        metrics = evaluate(model, self.test, prepare=self.prepare, device=device)
        if metrics.top1 > self.best[0]:
            self.best = torch.tensor([metrics.top1, epoch], dtype=torch.float64)
        report |= {"epoch": float(epoch), "top1": metrics.top1, "top5": metrics.top5, "best_top1": float(self.best[0])}
        return report | gaps(model, self.test, self.prepare)

    def state(self) -> Mapping[str, Tensor]:
        return {"best": self.best}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        self.best = tensors["best"].clone()


def batches(dataset: Dataset[Any], size: int, device: str, prepare: Prepare | None) -> Iterator[tuple[Tensor, Tensor]]:
    """All samples in order, without augmentation, on the device."""
    for images, targets in DataLoader(dataset, size):
        images = images.to(device)
        yield (images if prepare is None else prepare(images, None)), targets.to(device)


@torch.no_grad()
def gaps(distiller: Distiller, dataset: Dataset[Any], prepare: Prepare | None, size: int = 256) -> dict[str, float]:
    """The true feature gap of DPK on one batch that is not trained on: the losses without the teacher's tokens."""
    method = distiller.method
    if not isinstance(method, DPK):
        return {}
    device = str(next(distiller.student.parameters()).device)
    images, _ = next(batches(dataset, size, device, prepare))
    training_mode = distiller.training
    distiller.eval()
    try:
        student, teacher = distiller.run(0, images), distiller.teach(images)
        values = method.feature_gap(student.features, teacher.features).tolist()
    finally:
        distiller.train(training_mode)
    return {f"gap.{name}": value for name, value in zip(method.names, values, strict=True)}


@torch.no_grad()
def evaluate(
    model: nn.Module,
    dataset: Dataset[Any],
    *,
    batch_size: int = 256,
    device: str = "auto",
    prepare: Prepare | None = None,
) -> Metrics:
    """Accuracy of a classifier, or of a distiller's student, in evaluation mode; its mode is restored.

    Raises:
        InputError: no samples, or a label that the classifier has no class for.
        WorkError: logits that are not finite.
    """
    network = unwrap(model.student) if isinstance(model, Distiller) else model
    check_labels(dataset, None)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if isinstance(model, Distiller):
        device = str(next(network.parameters()).device)  # it stays where it trains
    network.to(device)
    modes = {module: module.training for module in network.modules()}
    network.eval()
    hits = torch.zeros(2, dtype=torch.float64, device=device)
    loss, count, classes = torch.zeros((), dtype=torch.float64, device=device), 0, 0
    try:
        for images, targets in batches(dataset, batch_size, device, prepare):
            logits = network(images).float()
            classes = logits.shape[1]
            if not count:
                check_labels(dataset, classes)
            order = logits.topk(min(5, classes), 1).indices == targets[:, None]
            hits += torch.stack([order[:, 0].sum(), order.any(1).sum()]).double()
            loss += functional.cross_entropy(logits, targets, reduction="sum").double()
            count += len(targets)
    finally:
        for module, mode in modes.items():
            module.training = mode
    if not math.isfinite(float(loss)):
        raise WorkError("the classifier's logits are not finite")
    top1, top5 = (100 * hits / count).tolist()
    return Metrics(top1, top5 if classes > 5 else 100.0, float(loss) / count, count)


def check_labels(dataset: Dataset[Any], classes: int | None) -> None:
    """Checks a data set before the first step, as far as it shows its labels (`labels`, `targets`, `tensors[1]`).

    Raises:
        InputError: no samples, or a label outside 0..classes-1.
    """
    if not len(dataset):  # pyright: ignore[reportArgumentType]
        raise InputError("the data set", found="no sample", expected="at least one")
    labels = getattr(dataset, "labels", getattr(dataset, "targets", None))
    if labels is None and isinstance(dataset, torch.utils.data.TensorDataset) and len(dataset.tensors) > 1:
        labels = dataset.tensors[1]
    if labels is None:
        return
    labels = torch.as_tensor(labels)
    least, most = int(labels.min()), int(labels.max())
    if least < 0 or (classes and most >= classes):
        raise InputError(
            "label", found=least if least < 0 else most, expected=f"0 to {classes - 1}" if classes else "at least 0"
        )
