"""What a checkpoint of the training loop holds, in one safetensors file: weights, their average, the optimiser's
moments, the method's own state, and the sums behind the next line of the log."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from papercore.errors import InputError
from papercore.rundir import atomic


class HasState(Protocol):
    """The part of a training method that a checkpoint needs."""

    def state(self) -> Mapping[str, Tensor]: ...

    def load_state(self, tensors: Mapping[str, Tensor]) -> None: ...


class State:
    """See the module."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        method: HasState,
        ema: float | None,
        accelerator: Accelerator,
        identity: str,
    ) -> None:
        self.model, self.optimizer, self.method = model, optimizer, method
        self.ema, self.accelerator = ema, accelerator
        self.identity = identity
        """of the run's whole configuration"""
        self.loss = math.nan
        self.total = torch.zeros((), device=accelerator.device)
        """sum of the losses since the last line of the log, and over how many steps"""
        self.stretch = 0
        self.sums: dict[str, Tensor] = {}
        """of the tensors that the method reports, since the last line"""
        self.values: dict[str, float] = {}
        """the floats that it reports, the last of each"""
        self.mean: dict[str, Tensor] = {}
        if ema is not None:
            self.mean = {name: value.detach().clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def average(self) -> None:
        """Moves the average towards the weights; what is not a floating number is copied."""
        if self.ema is None:
            return
        for name, value in self.model.state_dict().items():
            if value.is_floating_point():
                self.mean[name].lerp_(value, 1 - self.ema)
            else:
                self.mean[name].copy_(value)

    def observe(self, report: Mapping[str, float | Tensor]) -> None:
        """Takes up what the method reports of one step, without waiting for the device."""
        for name, value in report.items():
            if isinstance(value, Tensor):
                value = value.detach().to(device=self.total.device, dtype=torch.float32)
                self.sums[name] = self.sums[name] + value if name in self.sums else value.clone()
            else:
                self.values[name] = float(value)

    def reduce(self) -> None:
        """Replaces every sum by its mean over the processes, which must all call it together."""
        for name, value in (("", self.total), *self.sums.items()):
            reduced = self.accelerator.reduce(value, reduction="mean")
            assert isinstance(reduced, Tensor)
            if name:
                self.sums[name] = reduced
            else:
                self.total = reduced

    def observed(self) -> dict[str, float]:
        """For the log, over the steps since its last line."""
        found = self.values | {name: float(value) / self.stretch for name, value in self.sums.items()}
        return dict(sorted(found.items()))

    def start_stretch(self) -> None:
        """The log has a new line."""
        self.total = torch.zeros_like(self.total)
        self.stretch, self.sums, self.values = 0, {}, {}

    def use_average(self) -> None:
        if self.mean:
            self.model.load_state_dict(self.mean)

    def save(self, path: Path, step: int) -> None:
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        tensors |= {f"mean.{name}": value for name, value in self.mean.items()}
        for index, entries in self.optimizer.state_dict()["state"].items():
            entries = {name: value for name, value in entries.items() if isinstance(value, Tensor)}
            tensors |= {f"optimizer.{index}.{name}": value for name, value in entries.items()}
        tensors |= {f"method.{name}": value for name, value in self.method.state().items()}
        tensors |= {f"sum.{name}": value for name, value in self.sums.items()}
        tensors["total"] = self.total
        notes = {"step": step, "loss": self.loss, "stretch": self.stretch, "scaler": None, "run": self.identity}
        notes |= {"values": self.values, "tensors": len(tensors)}
        if self.accelerator.scaler is not None:
            notes["scaler"] = self.accelerator.scaler.state_dict()
        # clones: weights that modules share may not share memory in the file
        tensors = {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}
        with atomic(path) as temporary:
            save_file(tensors, temporary, metadata={"state": json.dumps(notes)})

    def load(self, path: Path) -> int:
        """Restores everything; gives the number of steps done.

        Raises:
            InputError: the file is damaged or belongs to another model.
        """
        try:
            with safe_open(path, framework="pt") as file:
                notes = json.loads((file.metadata() or {})["state"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        except (SafetensorError, KeyError, ValueError, OSError) as error:
            raise InputError(
                "damaged checkpoint",
                where=path,
                found=str(error),
                expected="safetensors",
                hint="--no-resume starts anew",
            ) from error

        if notes.get("run") != self.identity:
            raise InputError("checkpoint of another run", where=path, hint="--no-resume starts anew")

        def under(prefix: str) -> dict[str, Tensor]:
            return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}

        try:
            self.model.load_state_dict(under("model."))
        except RuntimeError as error:
            raise InputError("checkpoint of another model", where=path, found=str(error).splitlines()[1:2]) from error
        if "total" not in tensors or len(tensors) != notes["tensors"]:
            raise InputError(
                "damaged checkpoint",
                where=path,
                found="too few tensors",
                expected="all",
                hint="--no-resume starts anew",
            )
        device = self.accelerator.device
        self.mean = {name: value.to(device) for name, value in under("mean.").items()}
        self.total = tensors["total"].to(device)
        self.stretch, self.values = notes["stretch"], notes["values"]
        self.sums = {name: value.to(device) for name, value in under("sum.").items()}
        self.method.load_state(under("method."))
        if notes["scaler"] and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(notes["scaler"])
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in under("optimizer.").items():
            index, _, entry = name.partition(".")
            moments.setdefault(int(index), {})[entry] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self.loss = notes["loss"]
        return notes["step"]
