"""Noise schedules, sampling on any list of timesteps, and the Frechet distance."""

from papercore.diffusion.frechet import frechet_distance, statistics
from papercore.diffusion.sampling import (
    check_timesteps,
    ddim_sample,
    dpm_sample,
    dpm_solver,
    guided,
    respaced_timesteps,
)
from papercore.diffusion.schedule import add_noise, linear_alphas_cumprod

__all__ = [
    "add_noise",
    "check_timesteps",
    "ddim_sample",
    "dpm_sample",
    "dpm_solver",
    "frechet_distance",
    "guided",
    "linear_alphas_cumprod",
    "respaced_timesteps",
    "statistics",
]
