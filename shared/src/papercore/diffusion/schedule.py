"""The noise schedule of denoising diffusion (DDPM, arXiv 2006.11239, section 2)."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def linear_alphas_cumprod(steps: int = 1000, first: float = 1e-4, last: float = 0.02) -> Float[Tensor, " steps"]:
    """Cumulative products of 1 - beta for betas that grow linearly from `first` to `last`, float64."""
    return (1 - torch.linspace(first, last, steps, dtype=torch.float64)).cumprod(0)


def add_noise(
    x: Float[Tensor, "batch *shape"],
    noise: Float[Tensor, "batch *shape"],
    timesteps: Int[Tensor, " batch"],
    alphas_cumprod: Float[Tensor, " steps"],
) -> Float[Tensor, "batch *shape"]:
    """x_t = sqrt(a_t) x + sqrt(1 - a_t) noise."""
    a = alphas_cumprod.to(x.device)[timesteps].reshape(-1, *[1] * (x.ndim - 1))
    return a.sqrt().to(x.dtype) * x + (1 - a).sqrt().to(x.dtype) * noise
