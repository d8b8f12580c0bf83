"""The float network that a supernet starts from."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from papercore import training
from papercore.data.cifar_resnet import load_cifar_resnet, resnet_file
from papercore.errors import InputError
from papercore.weights import load_exactly, read_tensors
from torch import Tensor, nn
from torch.nn import functional

from oneshot_mpq.data import Splits
from oneshot_mpq.models import CIFAR, seeded_model


def cross_entropy(model: nn.Module, batch: Any, generator: torch.Generator) -> Tensor:
    """The loss of the float training."""
    x, y = batch
    return functional.cross_entropy(model(x).float(), y)


def starting_model(
    name: str, splits: Splits, *, data: Path | None = None, weights: Path | None = None, seed: int = 0
) -> tuple[nn.Module, str]:
    """An untrained model, or one with weights: from a file, or for CIFAR-10's ResNets from the data folder.

    Returns:
        the model, and where its weights come from.

    Raises:
        InputError: no such model, or weights that do not fit.
    """
    model = seeded_model(name, splits.classes, splits.shape[0], seed)
    if weights is not None:
        load_exactly(model, read_tensors(weights), weights)
        return model, weights.name
    if name in CIFAR and splits.classes == 10 and data is not None and resnet_file(data, CIFAR[name]).exists():
        return load_cifar_resnet(data, CIFAR[name]), resnet_file(data, CIFAR[name]).name
    return model, "random"


def train_float(
    model: nn.Module,
    splits: Splits,
    out: Path,
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    source: str,
    seed: int = 0,
    device: str = "auto",
    resume: bool = True,
    label: str = "float network",
) -> training.TrainResult:
    """Trains (or goes on training) in `out`: AdamW, one cycle.

    Args:
        source: where the weights at the start come from; another source is another run.
    """
    size = len(splits.train)  # pyright: ignore[reportArgumentType]
    if size < 1:
        raise InputError("the data set", found="no training image", expected="at least one")
    per_epoch = max(1, size // batch_size)
    config = training.TrainConfig(
        steps=epochs * per_epoch,
        batch_size=batch_size,
        learning_rate=learning_rate,
        schedule="one-cycle",
        weight_decay=0.05,
        log_every=per_epoch,
        checkpoint_every=5 * per_epoch,
        seed=seed,
    )
    return training.train(
        model,
        splits.train,
        cross_entropy,
        config,
        out,
        device=device,
        resume=resume,
        label=label,
        provenance={"start": source, "model": type(model).__name__},
    )


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a data set's networks are trained with unless it is said otherwise."""

    float_epochs: int
    float_rate: float
    batch_size: int
    epochs: int
    learning_rate: float
    step_rate: float
    ema: float | None


RECIPES = {
    "digits": Recipe(25, 3e-3, 64, 40, 0.04, 1e-3, None),
    "cifar10": Recipe(5, 1e-3, 256, 40, 0.04, 1e-4, 0.999),
    "cifar100": Recipe(5, 1e-3, 256, 40, 0.04, 1e-4, 0.999),
    "folder": Recipe(0, 1e-3, 128, 150, 0.04, 1e-5, 0.9997),
}
"""digits: specification 4(a); CIFAR: 4(b); folder: the paper's for ImageNet, from given weights"""
