"""Inputs of the noise model as they occur when it samples: (x_t, t, y)."""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from jaxtyping import Float, Int
from papercore.diffusion import ddim_sample, guided, linear_alphas_cumprod, respaced_timesteps
from papercore.errors import InputError
from papercore.rundir import atomic
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Inputs of a noise model."""

    x: Float[Tensor, "n channels height width"]
    t: Int[Tensor, " n"]
    y: Int[Tensor, " n"]
    """class labels; the number of classes stands for "no class" """

    def __len__(self) -> int:
        return len(self.x)

    def batches(self, size: int) -> Iterator["Calibration"]:
        """Consecutive parts of at most `size` inputs."""
        for first in range(0, len(self), size):
            part = slice(first, first + size)
            yield Calibration(self.x[part], self.t[part], self.y[part])

    @torch.no_grad()
    def run(self, model: nn.Module, batch: "Calibration") -> Tensor:
        """The noise that `model` predicts for `batch`, on the model's device."""
        device = next((p.device for p in model.parameters()), batch.x.device)
        return predict_noise(model, batch.x.to(device), batch.t.to(device), batch.y.to(device))

    def save(self, path: Path) -> None:
        with atomic(Path(path)) as temporary:
            save_file({"x": self.x.contiguous(), "t": self.t.contiguous(), "y": self.y.contiguous()}, temporary)

    @classmethod
    def load(cls, path: Path) -> "Calibration":
        """Reads and checks a calibration file.

        Raises:
            InputError: damaged file, wrong keys, shapes, types, or empty; names file and key.
        """
        try:
            tensors = load_file(path)
        except (SafetensorError, OSError) as error:
            raise InputError("calibration file", where=path, found=str(error), expected="safetensors") from error
        for key in ("x", "t", "y"):
            if key not in tensors:
                raise InputError(f"key {key}", where=path, found=", ".join(sorted(tensors)), expected="x, t and y")
        x, t, y = tensors["x"], tensors["t"], tensors["y"]
        if x.ndim != 4 or not x.is_floating_point() or len(x) == 0:
            raise InputError(
                "key x", where=path, found=f"{x.dtype} {tuple(x.shape)}", expected="float [n, c, h, w], n > 0"
            )
        if not torch.isfinite(x).all():
            raise InputError("key x", where=path, found="values that are not finite", expected="finite ones")
        for key, value in (("t", t), ("y", y)):
            if value.shape != x.shape[:1] or value.dtype not in (torch.int64, torch.int32):
                raise InputError(
                    f"key {key}", where=path, found=f"{value.dtype} {tuple(value.shape)}", expected=f"int64 ({len(x)},)"
                )
        return cls(x.float(), t.long(), y.long())

    def check_fits(self, model: nn.Module, where: object = None) -> None:
        """Raises InputError when shapes or labels are not those of the DiT `model`."""
        config = getattr(model, "config", None)
        if config is None or not hasattr(config, "sample_size"):
            return
        expected = (config.in_channels, config.sample_size, config.sample_size)
        if tuple(self.x.shape[1:]) != expected:
            raise InputError("key x", where=where, found=f"images of {tuple(self.x.shape[1:])}", expected=str(expected))
        for key, value, most in (("t", self.t, 999), ("y", self.y, config.num_embeds_ada_norm)):
            if int(value.min()) < 0 or int(value.max()) > most:
                raise InputError(
                    f"key {key}", where=where, found=f"{int(value.min())}..{int(value.max())}", expected=f"0..{most}"
                )


def predict_noise(model: nn.Module, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """The noise part of a DiT's output: its first channels, as many as `x` has (the rest is variance)."""
    out = model(x, timestep=t, class_labels=y)
    out = out if isinstance(out, Tensor) else out.sample
    return out[:, : x.shape[1]]


def collect_calibration(
    model: nn.Module,
    *,
    samples: int = 256,
    steps: int = 50,
    guidance: float | None = 1.5,
    null_fraction: float = 0.5,
    seed: int = 0,
    guided_channels: int | None = 3,
) -> Calibration:
    """Inputs met while a DiT samples (specification, section 3).

    Batches of 16 random labels run through the sampler; from every batch 16 different timesteps are drawn (with
    repetition when there are fewer steps), one for each sample. `null_fraction` of the inputs get the label "no
    class", because guidance evaluates it at every step.

    Raises:
        InputError: numbers out of range.
    """
    check_guidance(guidance)
    if samples < 1 or not 0 <= null_fraction <= 1:
        raise InputError(
            "calibration", found=f"{samples} samples, null fraction {null_fraction}", expected=">= 1, in [0, 1]"
        )
    training = model.training
    model.eval()  # label dropout would make the inputs random
    config = model.config
    shape = (config.in_channels, config.sample_size, config.sample_size)  # pyright: ignore[reportAttributeAccessIssue]
    classes: int = config.num_embeds_ada_norm  # pyright: ignore[reportAssignmentType, reportAttributeAccessIssue]
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    timesteps = respaced_timesteps(1000, steps)
    kept: list[tuple[Tensor, Tensor, Tensor]] = []
    for first in range(0, samples, 16):
        count = min(16, samples - first)
        labels = torch.randint(classes, (count,), generator=generator)
        order = torch.randperm(steps, generator=generator)
        chosen = order[torch.arange(count) % steps]
        noise = torch.randn(count, *shape, generator=generator)
        null = torch.rand(count, generator=generator) < null_fraction
        visited: list[Tensor] = []
        noise_model = guided(
            lambda x, t, y: predict_noise(model, x, t, y),
            labels.to(device),
            classes,
            guidance,
            channels=guided_channels,
        )

        def recording(x: Tensor, t: Tensor, visited=visited, noise_model=noise_model) -> Tensor:
            visited.append(x.cpu())
            return noise_model(x, t)

        ddim_sample(recording, noise.to(device), timesteps, linear_alphas_cumprod())
        x = torch.stack([visited[int(step)][i] for i, step in enumerate(chosen)])
        t = torch.tensor([timesteps[len(timesteps) - 1 - int(step)] for step in chosen])
        kept.append((x, t, torch.where(null, classes, labels)))
    x, t, y = (torch.cat(parts) for parts in zip(*kept, strict=True))
    model.train(training)
    if not torch.isfinite(x).all():
        raise InputError("sampled inputs", found="values that are not finite", expected="finite ones")
    return Calibration(x.to(device), t.to(device), y.to(device))


def check_guidance(guidance: float | None) -> None:
    """Raises InputError unless the guidance weight is None or a finite number."""
    if guidance is not None and not math.isfinite(guidance):
        raise InputError("guidance", found=guidance, expected="a finite number")
