"""Calibration data: the inputs the network sees along real sampling trajectories (TMPQ-DM and Q-Diffusion).

The full-precision network samples with DDIM; at every recorded step its input x_t, t and the condition are kept. Of S
recorded steps M are used, those with index floor(i S / M). Recorded are the steps of an ordinary list, of the very list
that will be visited, or of lists drawn from timestep groups, which is where a search will look.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from papercore.diffusion.sampling import check_timesteps, ddim_sample
from papercore.errors import InputError
from papercore.rundir import atomic
from safetensors.torch import save_file
from torch import Tensor, nn

from tmpqdm.models import check_model, input_shape, predict

CHUNK = 4
"""samples that follow one list when lists are drawn from groups"""

Spacing = Literal["quadratic", "uniform"]


@dataclasses.dataclass(frozen=True)
class CalibrationSet:
    """Inputs of a network: x [n, C, H, W], t [n], conditions by keyword, one row a sample."""

    x: Float[Tensor, "n channels height width"]
    t: Int[Tensor, " n"]
    cond: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    source: str = "calibration set"
    """the file it came from, for messages"""

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, rows: slice | Tensor) -> "CalibrationSet":
        cond = {name: value[rows] for name, value in self.cond.items()}
        return CalibrationSet(self.x[rows], self.t[rows], cond, self.source)

    def save(self, path: Path) -> None:
        """A .safetensors or .npz file with x, t and cond/NAME."""
        path = Path(path)
        if path.suffix not in (".safetensors", ".npz"):
            raise InputError("name of a calibration set", found=path.name, expected=".safetensors or .npz")
        tensors = {"x": self.x, "t": self.t} | {f"cond/{name}": value for name, value in self.cond.items()}
        tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        with atomic(path) as temporary:
            if path.suffix == ".npz":
                with temporary.open("wb") as file:
                    arrays: Any = {name: value.numpy() for name, value in tensors.items()}
                    np.savez(file, **arrays)
            else:
                save_file(tensors, temporary)

    @classmethod
    def load(cls, path: Path) -> "CalibrationSet":
        """Reads what `save` writes, and checks it.

        Raises:
            InputError: names the file and the field.
        """
        path = Path(path)
        tensors = _read(path)
        cond = {}
        for name in tensors:
            if name.startswith("cond/"):
                cond[name.removeprefix("cond/")] = tensors[name]
            elif name not in ("x", "t"):
                raise InputError(f"field {name}", where=path, found="an unknown field", expected="x, t or cond/NAME")
        for name in ("x", "t"):
            if name not in tensors:
                raise InputError(f"field {name}", where=path, found="nothing", expected="an array")
        made = cls(tensors["x"], tensors["t"], cond, str(path))
        made.validate()
        return made

    @classmethod
    def from_q_diffusion(
        cls, path: Path, *, use: int = 20, samples: int | None = None, condition: str = "encoder_hidden_states"
    ) -> "CalibrationSet":
        """Imports a file of Q-Diffusion: a dictionary of lists xs, ts and perhaps cs, ucs, one entry a recorded step.

        Args:
            path: read with `torch.load(weights_only=True)`.
            use: steps to take, of those recorded.
            samples: of every step; None takes all.
            condition: the model's keyword for cs and ucs. Where ucs is present, every input comes twice.
        """
        path = Path(path)
        try:
            data = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # the unpickler raises whatever it likes
            raise InputError(
                "calibration data",
                where=path,
                found=str(error).splitlines()[0],
                expected="a dictionary of tensors that loads with weights_only=True",
            ) from error
        if not isinstance(data, dict) or not {"xs", "ts"} <= set(data):
            found = sorted(map(str, data)) if isinstance(data, dict) else type(data).__name__
            raise InputError("calibration data", where=path, found=found, expected="xs and ts")
        lists = {name: list(data[name]) for name in ("xs", "ts", "cs", "ucs") if data.get(name) is not None}
        for name, values in lists.items():
            if len(values) != len(lists["xs"]):
                raise InputError(f"field {name}", where=path, found=f"{len(values)} steps", expected=len(lists["xs"]))
        steps = recorded_steps(len(lists["xs"]), use)
        rows = {
            name: torch.cat([torch.as_tensor(values[i])[:samples] for i in steps]) for name, values in lists.items()
        }
        x, t, cond = rows["xs"].float(), rows["ts"].long().reshape(-1), {}
        if "cs" in rows:
            cond[condition] = rows["cs"]
            if "ucs" in rows:
                x, t = torch.cat([x, x]), torch.cat([t, t])
                cond[condition] = torch.cat([rows["cs"], rows["ucs"]])
        made = cls(x, t, cond, str(path))
        made.validate()
        return made

    def validate(self, model: nn.Module | None = None, *, train_steps: int = 1000, batch_size: int = 1) -> None:
        """Raises InputError, with the field, for a set that is empty, not finite, of other counts or channels, with
        timesteps outside 0..`train_steps` - 1, or smaller than a batch."""
        where, n = self.source, len(self.x)
        if not n or self.x.numel() == 0:
            raise InputError("field x", where=where, found="no samples", expected="at least one")
        if self.x.ndim != 4 or not self.x.is_floating_point():
            raise InputError("field x", where=where, found=f"{self.x.dtype} {tuple(self.x.shape)}",
                             expected="floating-point numbers [n, C, H, W]")  # fmt: skip
        if self.t.ndim != 1 or self.t.is_floating_point() or self.t.dtype == torch.bool:
            raise InputError("field t", where=where, found=f"{self.t.dtype} {tuple(self.t.shape)}",
                             expected="whole numbers [n]")  # fmt: skip
        for name, value in {"t": self.t, **{f"cond/{k}": v for k, v in self.cond.items()}}.items():
            if len(value) != n:
                raise InputError(f"field {name}", where=where, found=f"{len(value)} rows", expected=f"{n} as in x")
        for name, value in {"x": self.x, **{f"cond/{k}": v for k, v in self.cond.items()}}.items():
            if value.is_floating_point():
                finite = torch.isfinite(value).reshape(n, -1).all(1)
                if not finite.all():
                    found = f"values that are not finite in sample {int((~finite).nonzero()[0])}"
                    raise InputError(f"field {name}", where=where, found=found, expected="numbers")
        wrong = (self.t < 0) | (self.t >= train_steps)
        if wrong.any():
            i = int(wrong.nonzero()[0])
            raise InputError("field t", where=where, found=f"{int(self.t[i])} in sample {i}",
                             expected=f"timesteps in 0..{train_steps - 1}")  # fmt: skip
        channels = getattr(getattr(model, "config", None), "in_channels", None)
        if channels is not None and self.x.shape[1] != channels:
            raise InputError(
                "field x", where=where, found=f"{self.x.shape[1]} channels", expected=f"{channels} of the model"
            )
        if n < batch_size:
            raise InputError("field x", where=where, found=f"{n} samples", expected=f"at least a batch of {batch_size}")


def recorded_steps(steps: int, use: int) -> list[int]:
    """Which of `steps` recorded steps are used: floor(i steps / use)."""
    if not 1 <= use <= steps:
        raise InputError("steps to use", found=use, expected=f"from 1 to the {steps} that are recorded")
    return [i * steps // use for i in range(use)]


def trajectory(steps: int, train_steps: int, spacing: Spacing) -> list[int]:
    """An ordinary list of timesteps, ascending: "quadratic" as for CIFAR-10, floor((sqrt(0.8 T) j / (N-1))^2), without
    the repetitions near 0; "uniform" floor(j T / N)."""
    if not 2 <= steps <= train_steps:
        raise InputError("steps", found=steps, expected=f"from 2 to {train_steps}")
    if spacing == "uniform":
        return [j * train_steps // steps for j in range(steps)]
    return sorted({int(value) for value in np.linspace(0, np.sqrt(train_steps * 0.8), steps) ** 2})


@torch.no_grad()
def collect_calibration(
    model: nn.Module,
    scheduler: Any,
    *,
    samples: int = 32,
    steps: int = 100,
    use: int = 20,
    seed: int = 0,
    timesteps: Any = None,
    labels: Sequence[int] | Tensor | None = None,
    cond: Mapping[str, Tensor] | None = None,
    uncond: Mapping[str, Tensor] | None = None,
    guidance: float | None = None,
    spacing: Spacing = "quadratic",
    shape: tuple[int, int, int] | None = None,
    batch_size: int = 64,
) -> CalibrationSet:
    """Runs the full-precision network down DDIM trajectories and keeps its inputs.

    Args:
        scheduler: a diffusers scheduler: its alphas_cumprod and prediction type count.
        samples: trajectories.
        steps: recorded steps of a trajectory, of which `use` are kept.
        timesteps: instead of `steps` and `use`: the list to visit and to keep, ascending; or timestep groups
            (anything with `.sample(rng)`): every few samples follow a list drawn from the groups.
        labels: classes, one a sample; shorter lists are repeated.
        cond, uncond: conditions and their empty counterparts, one row a sample.
        guidance: classifier-free guidance along the trajectory; inputs with and without the condition are kept. The
            empty class of `labels` is the one after the last (DiT).
        spacing: of the recorded steps.
        shape: (channels, height, width); None takes the model's.

    Raises:
        InputError: the model is of no known family and `shape` is missing, or an option does not fit.
    """
    if samples < 1:
        raise InputError("samples", found=samples, expected="at least 1")
    check_model(model)
    alphas = scheduler.alphas_cumprod.double().cpu()
    total = len(alphas)
    parameter = next(model.parameters())
    conditions = dict(cond or {})
    empty = dict(uncond or {})
    if labels is not None:
        given = torch.as_tensor(labels, dtype=torch.long).reshape(-1)
        conditions["class_labels"] = given.repeat(-(-samples // len(given)))[:samples]
        if guidance is not None:
            config: Any = model.config
            null = getattr(config, "num_embeds_ada_norm", None) or config.num_class_embeds
            empty["class_labels"] = torch.full((samples,), int(null))
    elif type(model).__name__ == "DiTTransformer2DModel" and "class_labels" not in conditions:
        raise InputError("labels", found="none", expected="classes, one a sample")
    for name, value in (*conditions.items(), *empty.items()):
        if len(value) != samples:
            raise InputError(f"condition {name}", found=f"{len(value)} rows", expected=f"{samples}, one a sample")
    if guidance is not None and set(empty) != set(conditions):
        raise InputError("uncond", found=sorted(empty), expected=f"{sorted(conditions)} as in cond")

    lists, kept = _lists(timesteps, samples, steps, use, seed, total, spacing, min(batch_size, samples))
    start = torch.randn((samples, *(shape or input_shape(model))), generator=torch.Generator().manual_seed(seed))
    modes = {module: module.training for module in model.modules()}
    rows: list[tuple[int, Tensor, Tensor, dict[str, Tensor]]] = []
    try:
        model.eval()
        for begin, end, visited in lists:
            part = slice(begin, end)
            here = {name: value[part].to(parameter.device) for name, value in conditions.items()}
            without = {name: value[part].to(parameter.device) for name, value in empty.items()}
            keep = {visited[i] for i in kept(visited)}

            def noise(x: Tensor, t: Tensor, here: Any = here, without: Any = without, keep: Any = keep) -> Tensor:
                step = int(t[0])
                if step in keep:
                    for given in (here, without) if guidance is not None else (here,):
                        rows.append((step, x.cpu(), t.cpu(), {name: value.cpu() for name, value in given.items()}))
                predicted = predict(model, x, t, here)
                if guidance is not None:
                    plain = predict(model, x, t, without)
                    predicted = plain + guidance * (predicted - plain)
                return as_noise(predicted, x, float(alphas[step]), scheduler.config.prediction_type)

            ddim_sample(noise, start[part].to(parameter.device, parameter.dtype), visited, alphas)
    finally:
        for module, training in modes.items():
            module.training = training
    rows.sort(key=lambda row: row[0])  # stable: by timestep, then by sample
    cond_names = rows[0][3]
    return CalibrationSet(
        torch.cat([row[1] for row in rows]),
        torch.cat([row[2] for row in rows]),
        {name: torch.cat([row[3][name] for row in rows]) for name in cond_names},
    )


def as_noise(output: Tensor, x: Tensor, alpha: float, prediction: str) -> Tensor:
    """The predicted noise, from a network that predicts noise ("epsilon"), velocity or the sample.

    With twice the channels of x the second half is a learned variance and is left out.

    Raises:
        InputError: another prediction type, or another number of channels.
    """
    channels = x.shape[1]
    if output.shape[1] == 2 * channels:
        output = output[:, :channels]
    elif output.shape[1] != channels:
        raise InputError(
            "output of the model", found=f"{output.shape[1]} channels", expected=f"{channels} or twice as many"
        )
    if prediction == "epsilon":
        return output
    if prediction == "v_prediction":
        return alpha**0.5 * output + (1 - alpha) ** 0.5 * x
    if prediction == "sample":
        return (x - alpha**0.5 * output) / (1 - alpha) ** 0.5
    raise InputError("prediction type", found=prediction, expected="epsilon, v_prediction or sample")


def _lists(
    timesteps: Any, samples: int, steps: int, use: int, seed: int, total: int, spacing: Spacing, batch: int
) -> tuple[list[tuple[int, int, list[int]]], Callable[[list[int]], Sequence[int]]]:
    """((first sample, last sample + 1, list) ..., list -> positions to keep)."""
    if hasattr(timesteps, "sample"):
        rng = np.random.default_rng([seed, 1])
        drawn = [
            (begin, min(begin + CHUNK, samples), [int(t) for t in timesteps.sample(rng)])
            for begin in range(0, samples, CHUNK)
        ]
        for _, _, visited in drawn:
            check_timesteps(visited, total)
        return drawn, lambda visited: range(len(visited))
    parts = [(begin, min(begin + batch, samples)) for begin in range(0, samples, batch)]
    if timesteps is not None:
        visited = [int(t) for t in timesteps]
        if visited != list(timesteps):
            raise InputError("timesteps", found=list(timesteps), expected="whole numbers")
        check_timesteps(visited, total)
        return [(begin, end, visited) for begin, end in parts], lambda visited: range(len(visited))
    visited = trajectory(steps, total, spacing)
    recorded_steps(len(visited), use)
    return [(begin, end, visited) for begin, end in parts], lambda visited: recorded_steps(len(visited), use)


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".npz":
        try:
            with np.load(path, allow_pickle=False) as archive:
                return {name: torch.from_numpy(np.asarray(archive[name])) for name in archive.files}
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise InputError(
                "calibration set", where=path, found=str(error), expected="an .npz file of arrays"
            ) from error
    from papercore.weights import read_tensors

    return read_tensors(path)
