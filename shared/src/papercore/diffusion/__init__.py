"""Noise schedules, sampling on any list of timesteps, and the Frechet distance."""

from papercore.diffusion.frechet import frechet_distance, statistics
from papercore.diffusion.sampling import ddim_sample, guided, respaced_timesteps
from papercore.diffusion.schedule import add_noise, linear_alphas_cumprod

__all__ = [
    "add_noise",
    "ddim_sample",
    "frechet_distance",
    "guided",
    "linear_alphas_cumprod",
    "respaced_timesteps",
    "statistics",
]
