"""Schedulers for diffusers' pipelines that run any list of timesteps.

diffusers' own DDIMScheduler takes the timestep before as t - T // N, whatever list it is given; here a step goes to
the next *visited* timestep. The arithmetic is that of `papercore.diffusion.sampling`.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler, DDIMSchedulerOutput
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from papercore.diffusion.sampling import check_timesteps
from papercore.errors import InputError
from torch import Tensor

if TYPE_CHECKING:
    from tmpqdm.plan import Plan


class NonUniformDDIMScheduler(DDIMScheduler):
    """DDIM with `set_timesteps(timesteps=...)`: put it in the place of a pipeline's scheduler.

    A list given once (or by `from_plan`) stays: pipelines that call `set_timesteps(50)` then run that list. Prediction
    types, clipping, thresholding and eta are those of diffusers. An output with twice the sample's channels (learned
    variance) is cut to its first half.
    """

    visited: tuple[int, ...] = ()
    """ascending; empty until a list is given: then steps are spaced as in DDIMScheduler"""

    @classmethod
    def from_plan(cls, plan: "Plan", scheduler: Any, *, force: bool = False) -> "NonUniformDDIMScheduler":
        """For the timesteps of a plan, with the settings of a pipeline's scheduler.

        Raises:
            InputError: the scheduler has another noise schedule than the plan was made for, without `force`; or the
                plan is for another sampler.
        """
        if plan.sampler != "ddim":
            raise InputError("sampler of the plan", found=plan.sampler, expected="ddim", hint="dpm_scheduler")
        made: Any = cls.from_config(scheduler.config)
        plan.check_schedule(made.alphas_cumprod, force=force)
        made.set_timesteps(timesteps=list(plan.timesteps))
        made.final_alpha_cumprod = torch.tensor(plan.final_alpha)
        return made

    def set_timesteps(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """Chooses the timesteps to visit.

        Args:
            num_inference_steps: as in DDIMScheduler; ignored when a list is or was given.
            timesteps: in either order, without repetition.

        Raises:
            InputError: the list is empty, repeats, is not sorted, or leaves the training schedule.
        """
        total = int(self.config.num_train_timesteps)  # pyright: ignore[reportAttributeAccessIssue]
        if timesteps is not None:
            values = list(timesteps)
            if len(values) > 1 and values[0] > values[-1]:
                values = values[::-1]
            check_list(values, total)
            self.visited = tuple(int(t) for t in values)
        if not self.visited:
            if num_inference_steps is None:
                raise InputError("timesteps", found="none", expected="a list or a number of steps")
            super().set_timesteps(num_inference_steps, device)  # pyright: ignore[reportArgumentType]
            spaced = sorted({min(int(t), total - 1) for t in self.timesteps.tolist()})
            self.num_inference_steps, self.following = len(spaced), _following(spaced)
            return
        self.num_inference_steps = len(self.visited)
        self.timesteps = torch.tensor(self.visited[::-1], dtype=torch.long, device=device)
        self.following = _following(self.visited)

    def previous(self, timestep: int) -> int:
        """The timestep that follows in sampling, -1 after the last.

        Raises:
            InputError: the timestep is not on the list.
        """
        try:
            return self.following[int(timestep)]
        except (KeyError, AttributeError):
            listed = list(getattr(self, "following", {}))
            raise InputError("timestep", found=int(timestep), expected=f"one of {listed}") from None

    def alpha(self, timestep: int) -> Tensor:
        """Cumulative alpha, the final one for -1."""
        return self.alphas_cumprod[timestep] if timestep >= 0 else torch.as_tensor(self.final_alpha_cumprod)

    def step(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: torch.Generator | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """One step of equation 12 of DDIM, to the next visited timestep."""
        channels = sample.shape[1]
        if model_output.shape[1] == 2 * channels:
            model_output = model_output[:, :channels]
        elif model_output.shape != sample.shape:
            raise InputError("model output", found=tuple(model_output.shape), expected=tuple(sample.shape))
        t = int(timestep)
        a, following = (self.alpha(i).to(sample.device, sample.dtype) for i in (t, self.previous(t)))
        kind = self.config.prediction_type  # pyright: ignore[reportAttributeAccessIssue]
        if kind == "epsilon":
            clean, noise = (sample - (1 - a) ** 0.5 * model_output) / a**0.5, model_output
        elif kind == "sample":
            clean, noise = model_output, (sample - a**0.5 * model_output) / (1 - a) ** 0.5
        elif kind == "v_prediction":
            clean = a**0.5 * sample - (1 - a) ** 0.5 * model_output
            noise = a**0.5 * model_output + (1 - a) ** 0.5 * sample
        else:
            raise InputError("prediction type", found=kind, expected="epsilon, sample or v_prediction")
        if self.config.thresholding:  # pyright: ignore[reportAttributeAccessIssue]
            clean = self._threshold_sample(clean)
        elif self.config.clip_sample:  # pyright: ignore[reportAttributeAccessIssue]
            limit = self.config.clip_sample_range  # pyright: ignore[reportAttributeAccessIssue]
            clean = clean.clamp(-limit, limit)
        if use_clipped_model_output:
            noise = (sample - a**0.5 * clean) / (1 - a) ** 0.5
        variance = (1 - following) / (1 - a) * (1 - a / following)
        sigma = eta * variance.clamp(min=0) ** 0.5
        x = following**0.5 * clean + (1 - following - sigma**2).clamp(min=0) ** 0.5 * noise
        if eta > 0:
            if variance_noise is None:
                variance_noise = _noise(sample, generator)
            x = x + sigma * variance_noise
        if not return_dict:
            return x, clean
        return DDIMSchedulerOutput(prev_sample=x, pred_original_sample=clean)

    def _get_variance(self, timestep: int, prev_timestep: int | None = None) -> Tensor:
        """Of the step from a visited timestep; pipelines do not ask, some of diffusers' own code does."""
        a, following = self.alpha(int(timestep)), self.alpha(self.previous(int(timestep)))
        return (1 - following) / (1 - a) * (1 - a / following)


def dpm_scheduler(plan: "Plan", scheduler: Any, *, force: bool = False) -> DPMSolverMultistepScheduler:
    """diffusers' multistep solver of order 2 on a plan's timesteps, which must then be given to the pipeline
    (`timesteps=`) or are set already.

    Raises:
        InputError: see `NonUniformDDIMScheduler.from_plan`.
    """
    if plan.sampler != "dpmpp-2m":
        raise InputError("sampler of the plan", found=plan.sampler, expected="dpmpp-2m")
    made: Any = DPMSolverMultistepScheduler.from_config(
        scheduler.config,
        algorithm_type="dpmsolver++",
        solver_order=2,
        final_sigmas_type="zero" if plan.final_alpha == 1 else "sigma_min",
    )
    plan.check_schedule(made.alphas_cumprod, force=force)
    made.set_timesteps(timesteps=list(plan.timesteps)[::-1])
    return made


def check_list(timesteps: Sequence[int], total: int) -> None:
    """Raises InputError that names the first place where the list is not ascending whole numbers in 0..total-1."""
    before = -1
    for place, t in enumerate(timesteps):
        whole = isinstance(t, int) or (hasattr(t, "__index__") and not isinstance(t, bool))
        if not whole or isinstance(t, bool):
            raise InputError(f"timesteps[{place}]", found=t, expected="a whole number")
        if not 0 <= int(t) < total:
            raise InputError(f"timesteps[{place}]", found=int(t), expected=f"in 0..{total - 1}")
        if int(t) <= before:
            raise InputError(f"timesteps[{place}]", found=int(t), expected=f"more than {before}, the one before it")
        before = int(t)
    check_timesteps([int(t) for t in timesteps], total)


def _following(ascending: Sequence[int]) -> dict[int, int]:
    return {t: ascending[i - 1] if i else -1 for i, t in enumerate(ascending)}


def _noise(sample: Tensor, generator: torch.Generator | None) -> Tensor:
    device = sample.device if generator is None else generator.device
    return torch.randn(sample.shape, generator=generator, device=device, dtype=sample.dtype).to(sample.device)
