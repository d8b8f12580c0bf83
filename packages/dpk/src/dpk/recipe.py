"""What one run consists of, as plain data: a YAML file, or the options of `dpk train`.

student: resnet20
teacher: resnet56
teacher_weights: resnet56.safetensors
dataset: cifar100
method: dpk
options: {ratio: dynamic, stages: 2}          # arguments of the method
pairs: [{student: layer2, teacher: layer2, patch: 2}]
solver: {epochs: 240, batch_size: 64, learning_rate: 0.05, milestones: [150, 180, 210]}
seed: 0
"""

import dataclasses
import importlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from papercore.config import build, load_yaml
from papercore.errors import InputError
from papercore.training import TrainConfig

from dpk.data import Source
from dpk.method import Method, Pair

METHODS = {
    "ce": "dpk.method:CrossEntropy",
    "kd": "dpk.methods:KD",
    "dkd": "dpk.methods:DKD",
    "fitnet": "dpk.methods:FitNet",
    "at": "dpk.methods:AttentionTransfer",
    "reviewkd": "dpk.methods:ReviewKD",
    "dpk": "dpk.dpk_method:DPK",
}
SHIPPED = Path(__file__).with_name("recipes")


@dataclasses.dataclass(frozen=True)
class Solver:
    """How a student is trained; the defaults are the usual ones for CIFAR-100 (specification 3.1)."""

    epochs: int = 240
    batch_size: int = 64
    learning_rate: float = 0.05
    optimizer: Literal["sgd", "adamw"] = "sgd"
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 5e-4
    schedule: Literal["constant", "cosine", "one-cycle", "steps"] = "steps"
    milestones: tuple[int, ...] = (150, 180, 210)
    """epochs after which the schedule "steps" lowers the rate; those beyond the last epoch do nothing"""
    gamma: float = 0.1
    clip_norm: float | None = None
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"

    def config(self, samples: int, seed: int, *, checkpoint_every: int | None = None) -> TrainConfig:
        """In optimiser steps, for a training set of so many samples."""
        if self.epochs < 1 or self.batch_size < 1:
            raise InputError("epochs, batch_size", found=(self.epochs, self.batch_size), expected="at least 1")
        an_epoch = max(1, round(samples / self.batch_size))
        return TrainConfig(
            steps=self.epochs * an_epoch,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            optimizer=self.optimizer,
            momentum=self.momentum,
            nesterov=self.nesterov,
            weight_decay=self.weight_decay,
            schedule=self.schedule,
            milestones=tuple(epoch * an_epoch for epoch in self.milestones) if self.schedule == "steps" else (),
            gamma=self.gamma,
            clip_norm=self.clip_norm,
            mixed_precision=self.mixed_precision,
            checkpoint_every=checkpoint_every or an_epoch,
            log_every=an_epoch,
            seed=seed,
        )


@dataclasses.dataclass(frozen=True)
class Recipe:
    """See the module."""

    student: str
    """a network's name, see `dpk.networks`"""
    teacher: str | None = None
    teacher_weights: Path | None = None
    dataset: Source = "cifar100"
    method: str = "dpk"
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """arguments of the method"""
    pairs: list[Any] | Literal["auto"] = "auto"
    """what `Pair.of` takes"""
    solver: Solver = dataclasses.field(default_factory=Solver)
    seed: int = 0

    def build_method(self) -> Method:
        """The method, not built yet.

        Raises:
            InputError: no such method, or an argument it does not have.
        """
        options = dict(self.options)
        if self.pairs != "auto":
            options["pairs"] = [Pair.of(pair) for pair in self.pairs]
        return make_method(self.method, options)


def make_method(name: str, options: Mapping[str, Any]) -> Method:
    """One of `METHODS` by name, with these arguments.

    Raises:
        InputError: no such method, or an argument it does not have or cannot use.
    """
    if name not in METHODS:
        raise InputError("method", found=name, expected=" or ".join(METHODS))
    module, _, attribute = METHODS[name].partition(":")
    cls = getattr(importlib.import_module(module), attribute)
    known = [key for key in inspect.signature(cls).parameters if key not in ("args", "kwargs")]
    for key in options:
        if key not in known:
            raise InputError(f"option {key} of {name}", found="a name that does not exist", expected=", ".join(known))
    try:
        return cls(**options)
    except TypeError as error:
        raise InputError(f"options of {name}", found=dict(options), expected=str(error)) from error


def read_recipe(name: str | Path) -> Recipe:
    """A recipe from a file, or one that ships with this package by its name.

    Raises:
        InputError: no such file or name, or a field that is wrong; names the file.
    """
    path = Path(name)
    if not path.exists() and not path.suffix:
        path = SHIPPED / f"{name}.yaml"
        if not path.exists():
            shipped = ", ".join(sorted(p.stem for p in SHIPPED.glob("*.yaml")))
            raise InputError("recipe", found=str(name), expected=f"a file, or one of {shipped}")
    return build(Recipe, load_yaml(path), path)
