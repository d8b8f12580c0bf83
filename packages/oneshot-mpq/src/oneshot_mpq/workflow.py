"""From a name and a data set to a trained supernet in a folder; what is done already is taken from there."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from papercore.errors import InputError
from torch.utils.data import DataLoader

from oneshot_mpq.checkpoint import load_supernet, read_notes, save_supernet
from oneshot_mpq.data import Name, Splits, load_splits
from oneshot_mpq.fit import FitResult, TrainConfig, fit
from oneshot_mpq.pretrain import RECIPES, starting_model, train_float
from oneshot_mpq.supernet import Supernet


@dataclasses.dataclass(frozen=True)
class Project:
    """What is trained on what."""

    model: str = "digits"
    """see `models.build_model`"""
    dataset: Name = "digits"
    data: Path | None = None
    weights: Path | None = None
    """of the float model, safetensors"""
    bits: tuple[int, ...] = (2, 3, 4, 5, 6)
    fixed: Mapping[str, tuple[int, int | None]] | None = None
    per_channel: bool = False
    float_epochs: int | None = None
    """nothing: the data set's recipe"""
    size: int = 224
    """of the pictures of a folder"""
    seed: int = 0
    limit: int | None = None
    """images of a part at most (CIFAR)"""

    def splits(self) -> Splits:
        return load_splits(self.dataset, self.data, seed=self.seed, size=self.size, limit=self.limit)

    def train_config(self, **changes: Any) -> TrainConfig:
        """The data set's recipe with changes."""
        recipe = RECIPES[self.dataset]
        epochs = changes.get("epochs", recipe.epochs)
        values = {
            "epochs": epochs,
            "batch_size": recipe.batch_size,
            "learning_rate": recipe.learning_rate,
            "step_learning_rate": recipe.step_rate,
            "warmup_epochs": min(5, epochs // 8),
            "ema": recipe.ema,
            "seed": self.seed,
        }
        return TrainConfig(**{**values, **changes})


def float_network(
    project: Project, splits: Splits, out: Path, *, device: str = "auto", resume: bool = True
) -> tuple[torch.nn.Module, str]:
    """The float model, trained in `out` where the recipe says so, and where its weights come from."""
    recipe = RECIPES[project.dataset]
    model, source = starting_model(project.model, splits, data=project.data, weights=project.weights, seed=project.seed)
    epochs = recipe.float_epochs if project.float_epochs is None else project.float_epochs
    if not epochs:
        if source == "random":
            raise InputError("float_epochs", found=0, expected="some epochs, or weights to start from")
        return model.eval(), source
    result = train_float(
        model,
        splits,
        out,
        epochs=epochs,
        batch_size=recipe.batch_size,
        learning_rate=recipe.float_rate,
        source=source,
        seed=project.seed,
        device=device,
        resume=resume,
    )
    return result.model, source


def convert(project: Project, model: torch.nn.Module, splits: Splits) -> Supernet:
    """The supernet of a float model; calibrated when the training begins."""
    return Supernet(
        model,
        torch.stack([splits.plain[i][0] for i in range(2)]),
        project.bits,
        project.fixed,
        per_channel=project.per_channel,
        name=project.model,
    )


def train_supernet(
    project: Project,
    config: TrainConfig,
    out: Path,
    *,
    device: str = "auto",
    resume: bool = True,
    watch: bool = False,
    float_out: Path | None = None,
    label: str = "oneshot-mpq: supernet",
) -> tuple[FitResult, Splits]:
    """Float network in `out`/float, training in `out`/run, the supernet itself in `out`.

    Args:
        float_out: folder of the float training, for several supernets of one float network.
        watch: log the interference of the bit-widths after every epoch, on the search images.
    """
    out = Path(out)
    splits = project.splits()
    model, source = float_network(project, splits, float_out or out / "float", device=device, resume=resume)
    net = convert(project, model, splits)
    if watch:
        size, batch = len(splits.train), config.batch_size or 1  # pyright: ignore[reportArgumentType]
        config = dataclasses.replace(config, log_every=max(1, size // batch))  # a line an epoch
    described = {"dataset": project.dataset, "start": source, "float_epochs": project.float_epochs}
    result = fit(
        net,
        splits.train,
        config,
        val_loader=DataLoader(splits.search, 500) if watch else None,
        out=out / "run",
        device=device,
        resume=resume,
        label=label,
        provenance={**described, "limit": project.limit},
    )
    if result.is_main:
        architecture = {"name": project.model, "classes": splits.classes, "channels": splits.shape[0]}
        notes = {**described, "seed": project.seed, "size": project.size, "limit": project.limit}
        save_supernet(net, out, architecture=architecture, notes=notes)
    return result, splits


def open_project(folder: Path, data: Path | None = None, *, device: str = "auto") -> tuple[Supernet, Splits]:
    """A supernet that `train_supernet` wrote, and the data that it was trained on.

    Raises:
        InputError: no such folder, or data that is missing.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device", found="cuda", expected="a CUDA GPU in this machine")
    notes = read_notes(folder)["notes"]
    for key in ("dataset", "seed", "size", "limit"):
        if key not in notes:
            raise InputError(f"notes.{key}", where=folder, found="nothing", expected="a supernet that train wrote")
    splits = load_splits(notes["dataset"], data, seed=notes["seed"], size=notes["size"], limit=notes["limit"])
    return load_supernet(folder, device=device), splits
