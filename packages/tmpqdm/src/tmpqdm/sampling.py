"""Pictures of a network on any list of timesteps, from noise that belongs to the picture's number.

Image i starts from the same noise whatever the batch size, the number of images, or the candidate: candidates are
compared on common random numbers. Classes and other conditions belong to the number as well.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, UInt8
from papercore.diffusion.sampling import ddim_sample, dpm_sample
from papercore.errors import InputError
from torch import Tensor, nn

from tmpqdm.calibration import as_noise
from tmpqdm.models import input_shape, predict

Solver = Literal["ddim", "dpmpp-2m"]


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How pictures are made: everything but the network and the list of timesteps.

    Raises:
        InputError: options that do not go together.
    """

    alphas_cumprod: Float[Tensor, " steps"]
    """of the whole schedule, float64"""
    shape: tuple[int, int, int]
    """channels, height, width"""
    prediction: str = "epsilon"
    """what the network predicts: epsilon, v_prediction or sample"""
    sampler: Solver = "ddim"
    """DDIM, or DPM-Solver++ of order 2"""
    eta: float = 0.0
    """noise of DDIM's steps"""
    final_alpha: float = 1.0
    """cumulative alpha that the last step goes to: 1, or alphas_cumprod[0] as latent models have it"""
    cond: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    """conditions by keyword; image i gets row i mod their number"""
    uncond: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    """the same for guidance"""
    guidance: float | None = None
    """weight of classifier-free guidance"""
    batch_size: int = 128
    low: float = -1.0
    """smallest value of a clean picture; the largest is 1"""

    def __post_init__(self) -> None:
        if self.sampler not in ("ddim", "dpmpp-2m"):
            raise InputError("sampler", found=self.sampler, expected="ddim or dpmpp-2m")
        if self.eta < 0 or (self.eta and self.sampler != "ddim"):
            raise InputError("eta", found=self.eta, expected="0, or a number above 0 with ddim")
        if self.batch_size < 1:
            raise InputError("batch_size", found=self.batch_size, expected="at least 1")
        if self.guidance is not None and set(self.cond) != set(self.uncond):
            raise InputError("uncond", found=sorted(self.uncond), expected=f"{sorted(self.cond)} as in cond")

    @classmethod
    def of(
        cls,
        model: nn.Module,
        scheduler: Any,
        *,
        labels: Sequence[int] = (),
        guidance: float | None = None,
        **options: Any,
    ) -> "Sampling":
        """For a diffusers model and the noise schedule of a diffusers scheduler.

        Args:
            labels: classes; image i gets label i mod their number. Class-conditional models need some.
            options: fields of this class.

        Raises:
            InputError: labels are missing, or outside of the model's classes.
        """
        config: Any = getattr(model, "config", None)
        classes = getattr(config, "num_embeds_ada_norm", None) or getattr(config, "num_class_embeds", None)
        classes = classes or getattr(model, "classes", None)
        options.setdefault("low", getattr(model, "low", -1.0))
        cond, uncond = dict(options.pop("cond", {})), dict(options.pop("uncond", {}))
        if classes and "class_labels" not in cond:
            if not labels:
                raise InputError("labels", found="none", expected=f"classes in 0..{classes - 1}")
            for label in labels:
                if not 0 <= label < classes:
                    raise InputError("labels", found=label, expected=f"classes in 0..{classes - 1}")
            cond["class_labels"] = torch.tensor(list(labels))
            if guidance is not None:
                uncond["class_labels"] = torch.full((len(labels),), int(classes))
        shape = options.pop("shape", None) or input_shape(model)
        prediction = options.pop("prediction", None) or scheduler.config.prediction_type
        alphas = scheduler.alphas_cumprod.double().cpu()
        return cls(
            alphas, (shape[0], shape[1], shape[2]), prediction, cond=cond, uncond=uncond, guidance=guidance, **options
        )

    def describe(self) -> dict[str, Any]:
        """What a record needs to know, as JSON values."""
        return {
            "sampler": self.sampler,
            "eta": self.eta,
            "final_alpha": self.final_alpha,
            "guidance": self.guidance,
            "classes": self.cond["class_labels"].tolist() if "class_labels" in self.cond else None,
        }

    @torch.no_grad()
    def __call__(
        self,
        network: nn.Module,
        timesteps: Sequence[int],
        images: int,
        seed: int,
        *,
        before: Callable[[int], None] | None = None,
    ) -> Float[Tensor, "images channels height width"]:
        """The samples, on the CPU.

        Args:
            network: called as (x, t, **conditions), in evaluation mode.
            timesteps: ascending.
            seed: of the noise; another seed gives independent pictures.
            before: called with the timestep before the network sees it (to switch bits from step to step).
        """
        if images < 1:
            raise InputError("images", found=images, expected="at least 1")
        parameter = next(network.parameters())
        alphas = self.alphas_cumprod
        done = []
        for begin in range(0, images, self.batch_size):
            numbers = range(begin, min(begin + self.batch_size, images))
            start, steps = self._noise(numbers, seed, len(timesteps) if self.eta else 0)
            rows = torch.tensor(numbers)
            here, without = (
                {name: value[rows % len(value)].to(parameter.device) for name, value in given.items()}
                for given in (self.cond, self.uncond)
            )

            def noise(x: Tensor, t: Tensor, here: Any = here, without: Any = without) -> Tensor:
                step = int(t[0])
                if before is not None:
                    before(step)
                output = predict(network, x, t, here)
                if self.guidance is not None and self.guidance != 1:
                    plain = predict(network, x, t, without)
                    output = plain + self.guidance * (output - plain)
                return as_noise(output, x, float(alphas[step]), self.prediction)

            x = start.to(parameter.device, parameter.dtype)
            if self.sampler == "ddim":
                step_noise = [part.to(x) for part in steps] if self.eta else None
                x = ddim_sample(
                    noise, x, timesteps, alphas, eta=self.eta, noise=step_noise, final_alpha_cumprod=self.final_alpha
                )
            else:
                x = dpm_sample(noise, x, timesteps, alphas, final_alpha_cumprod=self.final_alpha)
            done.append(x.float().cpu())
        return torch.cat(done)

    def pictures(self, samples: Float[Tensor, "n channels height width"]) -> UInt8[Tensor, "n height width channels"]:
        """Samples as uint8 pictures."""
        return to_uint8((samples - self.low) / (1 - self.low) * 2 - 1 if self.low != -1 else samples)

    def _noise(self, numbers: range, seed: int, steps: int) -> tuple[Tensor, list[Tensor]]:
        """(start [n, ...], noise of every step [n, ...]) of these images."""
        if not steps:
            return _bank(self.shape, seed, numbers.stop)[numbers.start :], []
        drawn = []
        for number in numbers:
            generator = _generator(seed, number)
            drawn.append([torch.randn(self.shape, generator=generator) for _ in range(steps + 1)])
        columns = [torch.stack(column) for column in zip(*drawn, strict=True)]
        return columns[0], columns[1:]


def to_uint8(samples: Float[Tensor, "n channels height width"]) -> UInt8[Tensor, "n height width channels"]:
    """[-1, 1] -> 0..255: clip((x + 1) 127.5, 0, 255), truncated, as TMPQ-DM scores pictures; not rounded, unlike
    `papercore.images.images_to_uint8`."""
    return ((samples.float() + 1) * 127.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _generator(seed: int, number: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 1_000_003 + number * 7_919_000_033) % 2**63)


@functools.lru_cache(maxsize=8)
def _bank(shape: tuple[int, int, int], seed: int, images: int) -> Tensor:
    """The first noise of images 0..images - 1."""
    return torch.stack([torch.randn(shape, generator=_generator(seed, number)) for number in range(images)])
