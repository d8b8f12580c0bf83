"""Training the supernet on papercore's loop: several processes, exact resume, averaged weights."""

import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from papercore import training
from papercore.errors import InputError
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, SequentialSampler, default_collate

from oneshot_mpq.batchnorm import BatchNormBank
from oneshot_mpq.sandwich import Sandwich
from oneshot_mpq.supernet import Supernet
from oneshot_mpq.watch import Watch


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The paper's recipe for ImageNet unless it is changed (specification, section 3).

    Gradients of all passes add up. With another number of `paths`, scale the learning rate by 4 / (1 + paths).
    """

    epochs: int = 150
    """passes over the training set"""
    paths: int = 3
    """random passes of a step, beside the one at the most bits"""
    idm: float = 0.01
    """weight of the information distortion; 0: off"""
    scheduler: bool = True
    """freeze and thaw the lowest bit of turbulent layers"""
    dampening: float = 0.1
    """largest weight of the oscillation dampening; 0: off"""
    dampening_start: int = 40
    """epoch at which it begins to rise"""
    batch_size: int | None = None
    """samples a step over all processes; nothing: the loader's"""
    learning_rate: float = 0.04
    """of the weights, SGD; the largest value"""
    final_learning_rate: float = 1e-5
    """where its cosine ends"""
    warmup_epochs: int = 5
    """of linear rise"""
    momentum: float = 0.9
    """of SGD, with Nesterov's rule"""
    weight_decay: float = 2.5e-5
    """on the weights of convolutions and searchable layers"""
    region_decay: float = 0.0
    """instead of it inside the clipping range of layers at two bits"""
    step_learning_rate: float = 1e-5
    """of the steps, Adam; a cosine to zero"""
    label_smoothing: float = 0.0
    """in the cross entropy"""
    ema: float | None = 0.9997
    """decay of the averaged weights that are handed out; nothing: the last weights"""
    clip: float | None = 1.0
    """largest absolute value of an element of the summed gradients"""
    accumulate: int = 1
    """micro-batches a step"""
    calibration: int = 256
    """training images that set the activation steps before the training"""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """data type of the forward pass"""
    checkpoint_every: int = 200
    """steps between two checkpoints"""
    log_every: int = 50
    """steps between two lines of the log"""
    seed: int = 0
    """of the order of samples and of the paths"""

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("paths", 0), ("calibration", 1), ("warmup_epochs", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError(f"field {name}", found=value, expected=f"a whole number of at least {least}")
        if self.warmup_epochs >= self.epochs:
            raise InputError("field warmup_epochs", found=self.warmup_epochs, expected=f"below {self.epochs} epochs")
        for name in ("idm", "dampening", "region_decay", "step_learning_rate"):
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise InputError(f"field {name}", found=value, expected="a number of at least 0")
        if not 0 <= self.label_smoothing < 1:
            raise InputError("field label_smoothing", found=self.label_smoothing, expected="in [0, 1)")


@dataclasses.dataclass(frozen=True)
class FitResult:
    """The trained supernet and what the loop saw."""

    net: Supernet
    """the one given, with the averaged weights; on the CPU, in evaluation mode"""
    loss: float
    """mean of the summed losses of a step over the last logged stretch"""
    steps: int
    seconds: float
    """of this process, without the steps of earlier ones"""
    is_main: bool
    """whether this process is the one that writes files"""


def fit(
    net: Supernet,
    train_loader: DataLoader[Any] | Dataset[Any],
    config: TrainConfig | None = None,
    *,
    val_loader: DataLoader[Any] | None = None,
    out: Path | str | None = None,
    teacher: nn.Module | None = None,
    device: str = "auto",
    resume: bool = True,
    label: str = "oneshot-mpq",
    provenance: Mapping[str, Any] | None = None,
) -> FitResult:
    """Trains `net` in place. Called again with the same arguments and `out`, it goes on where it stopped.

    Args:
        train_loader: gives (image, label); of a loader its data set and batch size are used, the order of samples
            comes from the seed alone. A data set needs `config.batch_size`.
        val_loader: with it, every epoch ends with a line of the log about the interference: accuracy of all uniform
            widths on it (batch statistics), turbulence and oscillation.
        out: run folder with log and checkpoint; nothing: a temporary one.
        teacher: its logits guide the largest path (1/2 cross entropy + 1/2 KL).
        device: "auto", "cpu" or "cuda".
        provenance: what else a resumed run must share.

    Raises:
        InputError: no sample, one sample a batch before a batch norm, labels beyond the classifier, `out` of another
            run.
        WorkError: loss, weights or steps are not finite.
    """
    config = config or TrainConfig()
    dataset, batch_size = _data(train_loader, config)
    size = len(dataset)  # pyright: ignore[reportArgumentType]
    per_epoch = max(1, size // batch_size)
    _check_labels(net, dataset, size, config)
    if batch_size // config.accumulate < 2 and _has_batch_norm(net):
        raise InputError("batch_size", found=batch_size, expected="2 or more samples a micro-batch for batch norm")
    watch = None if val_loader is None else Watch(net, val_loader, per_epoch)
    method = Sandwich(net, config, per_epoch, teacher, watch)
    loop = training.TrainConfig(
        steps=config.epochs * per_epoch,
        batch_size=batch_size,
        learning_rate=config.learning_rate,
        final_learning_rate=config.final_learning_rate,
        optimizer="sgd",
        momentum=config.momentum,
        nesterov=config.momentum > 0,
        weight_decay=config.weight_decay,
        schedule="cosine",
        warmup=config.warmup_epochs * per_epoch,
        ema=config.ema,
        clip_norm=None,
        clip_value=config.clip,
        accumulate=config.accumulate,
        mixed_precision=config.mixed_precision,
        checkpoint_every=config.checkpoint_every,
        log_every=config.log_every,
        seed=config.seed,
    )
    described = {
        "method": dataclasses.asdict(config),
        "model": net.name,
        "bits": list(net.bits),
        "layers": {name: [list(layer.weight_choices), list(layer.act_choices)] for name, layer in net.layers.items()},
        "fixed": {name: [layer.weight_bits, layer.act_bits] for name, layer in net.fixed.items()},
        **net.options,
        **(provenance or {}),
    }
    with tempfile.TemporaryDirectory() as temporary:
        if teacher is not None:
            teacher.to(training.make_accelerator(loop, device).device)
        result = training.train(
            net,
            dataset,
            method,
            loop,
            Path(temporary if out is None else out),
            device=device,
            resume=resume,
            label=label,
            provenance=described,
        )
    return FitResult(net, result.loss, result.steps, result.seconds, result.is_main)


def _data(loader: DataLoader[Any] | Dataset[Any], config: TrainConfig) -> tuple[Dataset[Any], int]:
    """The data set and the batch size.

    Raises:
        InputError: empty, without length, or a loader that does more than shuffle and batch.
    """
    if isinstance(loader, DataLoader):
        if not isinstance(loader.sampler, RandomSampler | SequentialSampler) or loader.batch_size is None:
            raise InputError(
                "train_loader", found=type(loader.sampler).__name__, expected="a loader that only shuffles"
            )
        if loader.collate_fn is not default_collate:
            raise InputError("train_loader", found="its own collate_fn", expected="torch's default")
        dataset, batch_size = loader.dataset, config.batch_size or loader.batch_size
    else:
        if config.batch_size is None:
            raise InputError("field batch_size", found=None, expected="a number, for a data set without a loader")
        dataset, batch_size = loader, config.batch_size
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise InputError("train_loader", found="a data set without length", expected="a map-style data set")
    if len(dataset) < 1:  # pyright: ignore[reportArgumentType]
        raise InputError("train_loader", found="no sample", expected="at least one")
    return dataset, batch_size


def _has_batch_norm(net: nn.Module) -> bool:
    return any(isinstance(m, BatchNormBank | nn.modules.batchnorm._BatchNorm) for m in net.modules())


def _check_labels(net: Supernet, dataset: Dataset[Any], size: int, config: TrainConfig) -> None:
    """Calibrates a fresh network on some training images; compares the labels with the classifier's width."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.mix(config.seed, "calibration"))
        chosen = torch.randperm(size)[: config.calibration].tolist()
        images, labels = default_collate([dataset[i] for i in chosen])
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.ndim != 1:
        raise InputError("train_loader", found=f"labels like {labels!r}"[:80], expected="(image, class number)")
    if not net.calibrated:
        net.calibrate(images.split(64))
    mode = net.training
    with torch.no_grad():
        classes = net.eval()(images[:2].to(next(net.parameters()).device)).shape[-1]
    net.train(mode)
    known = (
        getattr(dataset, "tensors", (None, None))[1]
        if hasattr(dataset, "tensors")
        else getattr(dataset, "targets", None)
    )
    everything = labels if known is None else torch.as_tensor(known)
    least, most = int(everything.min()), int(everything.max())
    if least < 0 or most >= classes:
        raise InputError("labels", found=f"{least} to {most}", expected=f"0 to {classes - 1} (the classifier's width)")
