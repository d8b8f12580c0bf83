"""DDIM (arXiv 2010.02502, equation 12) and DPM-Solver++ of order 2 (arXiv 2211.01095, algorithm 2) on any ascending
list of timesteps, and classifier-free guidance.

A step goes from a visited timestep to the next *visited* one, whatever their distance; the last goes to
`final_alpha_cumprod` (1: a clean sample). This is the re-spaced schedule of the guided-diffusion family, written on
the cumulative products instead of re-derived betas.
"""

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from papercore.errors import InputError

NoiseModel = Callable[[Tensor, Tensor], Tensor]
"""(x [batch, ...], timesteps [batch] int64) -> predicted noise, the shape of x"""


def respaced_timesteps(total: int, count: int) -> list[int]:
    """`count` timesteps, equally spaced from 0 to `total` - 1 with both ends, rounded (ties to even); ascending."""
    if not 1 <= count <= total:
        raise InputError("number of sampling steps", found=count, expected=f"from 1 to {total}")
    stride = (total - 1) / (count - 1) if count > 1 else 1.0
    return [round(i * stride) for i in range(count)]


def check_timesteps(timesteps: Sequence[int], total: int) -> None:
    """Raises InputError unless the list is ascending, without repetition, and within the schedule."""
    if not timesteps:
        raise InputError("timesteps", found="an empty list", expected="at least one")
    if any(a >= b for a, b in itertools.pairwise(timesteps)) or timesteps[0] < 0 or timesteps[-1] >= total:
        raise InputError("timesteps", found=list(timesteps), expected=f"ascending whole numbers in 0..{total - 1}")


@torch.no_grad()
def ddim_sample(
    model: NoiseModel,
    x: Tensor,
    timesteps: Sequence[int],
    alphas_cumprod: Tensor,
    *,
    eta: float = 0.0,
    generator: torch.Generator | None = None,
    noise: Sequence[Tensor] | None = None,
    final_alpha_cumprod: float = 1.0,
    observe: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Runs the sampler from noise `x` down the list and returns the sample.

    Args:
        timesteps: visited timesteps, ascending; the sampler walks from the last to the first.
        alphas_cumprod: of the whole schedule, float64.
        eta: 0 is deterministic; above 0, noise from `noise` (one tensor a step) or `generator` is added.
        final_alpha_cumprod: where the last step goes.
        observe: called after every step with (timestep, x after it, predicted clean sample).
    """
    check_timesteps(timesteps, len(alphas_cumprod))
    alphas = [float(alphas_cumprod[t]) for t in timesteps]
    for i in reversed(range(len(timesteps))):
        a, previous = alphas[i], alphas[i - 1] if i else final_alpha_cumprod
        eps = model(x, torch.full((len(x),), timesteps[i], dtype=torch.long, device=x.device))
        clean = (x - (1 - a) ** 0.5 * eps) / a**0.5
        sigma = eta * ((1 - previous) / (1 - a) * (1 - a / previous)) ** 0.5
        x = previous**0.5 * clean + max(0.0, 1 - previous - sigma**2) ** 0.5 * eps
        if sigma > 0:
            step = len(timesteps) - 1 - i
            x = x + sigma * (noise[step] if noise is not None else _noise_like(x, generator))
        if observe is not None:
            observe(timesteps[i], x, clean)
    return x


@torch.no_grad()
def dpm_sample(
    model: NoiseModel,
    x: Tensor,
    timesteps: Sequence[int],
    alphas_cumprod: Tensor,
    *,
    final_alpha_cumprod: float | None = 1.0,
    lower_order_final: bool = True,
    observe: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """DPM-Solver++(2M) from noise `x` down the list, and on to `final_alpha_cumprod`.

    Args:
        timesteps: visited timesteps, ascending; one call of the model each.
        final_alpha_cumprod: where the last step goes; None stops at the lowest timestep, without a call there.
        lower_order_final: take the last step with order 1 when there are fewer than 15 calls (it is of order 1 at
            `final_alpha_cumprod` 1 in any case).
        observe: called after every step with (timestep, x after it, predicted clean sample).
    """
    check_timesteps(timesteps, len(alphas_cumprod))
    if final_alpha_cumprod is None and len(timesteps) < 2:
        raise InputError("timesteps", found=list(timesteps), expected="at least two when the lowest is the end")
    alphas = [float(alphas_cumprod[t]) for t in timesteps]
    descending = list(reversed(alphas)) + ([] if final_alpha_cumprod is None else [final_alpha_cumprod])
    visited = list(reversed(timesteps))

    def noise(x: Tensor, index: int) -> Tensor:
        return model(x, torch.full((len(x),), visited[index], dtype=torch.long, device=x.device))

    def report(index: int, x: Tensor, clean: Tensor) -> None:
        if observe is not None:
            observe(visited[index], x, clean)

    return dpm_solver(noise, x, descending, lower_order_final=lower_order_final, observe=report)


@torch.no_grad()
def dpm_solver(
    noise: Callable[[Tensor, int], Tensor],
    x: Tensor,
    alphas: Sequence[float],
    *,
    lower_order_final: bool = True,
    observe: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """The multistep solver on a grid of cumulative alphas, which may come from continuous times.

    Args:
        noise: (x, number of the grid point) -> predicted noise there; asked at all points but the last.
        alphas: at every grid point, ascending (from noise to sample); the last may be 1.
    """
    clean_before, h_before = None, 0.0
    steps = len(alphas) - 1
    for i in range(steps):
        a, following = alphas[i], alphas[i + 1]
        clean = (x - (1 - a) ** 0.5 * noise(x, i)) / a**0.5
        last = i == steps - 1
        if following >= 1:
            x, clean_before = clean, clean
        else:
            h = _half_log_snr(following) - _half_log_snr(a)
            point = clean
            if clean_before is not None and not (last and lower_order_final and steps < 15):
                point = clean + (clean - clean_before) * (h / (2 * h_before))
            ratio = ((1 - following) / (1 - a)) ** 0.5
            x = ratio * x - following**0.5 * math.expm1(-h) * point
            clean_before, h_before = clean, h
        if observe is not None:
            observe(i, x, clean)
    return x


def _half_log_snr(alpha: float) -> float:
    """lambda = log(sqrt(a) / sqrt(1 - a))"""
    return 0.5 * (math.log(alpha) - math.log1p(-alpha))


def guided(
    predict: Callable[[Tensor, Tensor, Tensor], Tensor],
    labels: Tensor,
    null_label: int,
    guidance: float | None,
    *,
    channels: int | None = None,
) -> NoiseModel:
    """A noise model for `labels` with classifier-free guidance (arXiv 2207.12598, equation 6).

    Args:
        predict: (x, timesteps, labels) -> predicted noise.
        labels: one class a sample.
        null_label: the class that stands for none.
        guidance: w in e_null + w (e_label - e_null); None or 1 predicts with the labels alone.
        channels: guide only the first so many; the others keep the prediction for the label. None guides all.
    """
    if guidance is None or guidance == 1:
        return lambda x, t: predict(x, t, labels)
    both = torch.cat([labels, torch.full_like(labels, null_label)])

    def noise(x: Tensor, t: Tensor) -> Tensor:
        with_label, without = predict(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        mixed = without + guidance * (with_label - without)
        if channels is None or channels >= x.shape[1]:
            return mixed
        return torch.cat([mixed[:, :channels], with_label[:, channels:]], 1)

    return noise


def _noise_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    device = generator.device if generator is not None else x.device
    return torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype).to(x.device)
