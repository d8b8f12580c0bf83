"""Pictures (or latents) from noise, with the re-spaced sampler and guidance."""

import contextlib

import torch
from jaxtyping import Float, Int
from papercore.diffusion import ddim_sample, guided, linear_alphas_cumprod, respaced_timesteps
from papercore.errors import InputError
from torch import Tensor, nn

from qdit.calibration import check_guidance, predict_noise
from qdit.conditioning import precomputed_conditioning


def sample(
    model: nn.Module,
    z: Float[Tensor, "n channels height width"],
    labels: Int[Tensor, " n"],
    steps: int,
    *,
    guidance: float | None = None,
    guided_channels: int | None = 3,
    null_label: int | None = None,
    precompute: bool = False,
) -> Float[Tensor, "n channels height width"]:
    """DDIM (eta 0) over `steps` timesteps spaced from 0 to 999, the last step to a clean sample.

    Args:
        model: a DiT that predicts noise; output channels beyond those of `z` are ignored.
        z: the noise to start from.
        labels: classes.
        guidance: classifier-free guidance weight; None or 1 for none.
        guided_channels: how many channels are guided (the original DiT guides 3 of 4); None for all.
        null_label: the label of "no class"; the model's number of classes by default.
        precompute: compute the modulation of all blocks for the whole run beforehand; what it needs in memory and how
            exact it is: `qdit.precomputed_conditioning`.

    Raises:
        InputError: labels that the model does not have, or a wrong number of them.
    """
    check_guidance(guidance)
    classes = _classes(model)
    null = null_label if null_label is not None else classes
    if labels.shape != z.shape[:1]:
        raise InputError("labels", found=f"{len(labels)} labels", expected=f"{len(z)}, one a sample")
    if len(labels) == 0:
        return z.clone()
    if classes is not None and (int(labels.min()) < 0 or int(labels.max()) > classes):
        raise InputError("labels", found=f"{int(labels.min())}..{int(labels.max())}", expected=f"0..{classes}")
    if guidance is not None and guidance != 1 and null is None:
        raise InputError("null_label", found="none", expected="the label that stands for no class, for guidance")
    noise_model = guided(
        lambda x, t, y: predict_noise(model, x, t, y), labels, null or 0, guidance, channels=guided_channels
    )
    timesteps = respaced_timesteps(1000, steps)
    with contextlib.ExitStack() as stack:
        if precompute:
            used = labels if guidance is None or guidance == 1 else torch.cat([labels, labels.new_tensor([null])])
            stack.enter_context(precomputed_conditioning(model, timesteps, used))
        return ddim_sample(noise_model, z, timesteps, linear_alphas_cumprod())


def _classes(model: nn.Module) -> int | None:
    return getattr(getattr(model, "config", None), "num_embeds_ada_norm", None)


def sample_many(
    model: nn.Module,
    labels: Tensor,
    steps: int,
    *,
    guidance: float | None,
    seed: int,
    batch: int = 256,
    precompute: bool = False,
) -> Tensor:
    """Samples for `labels` from seeded noise, on the model's device; equal for every batch size."""
    config = model.config
    shape = (config.in_channels, config.sample_size, config.sample_size)  # pyright: ignore[reportAttributeAccessIssue]
    device = next(model.parameters()).device
    z = torch.randn(len(labels), *shape, generator=torch.Generator().manual_seed(seed))
    parts = [
        sample(
            model, z[part].to(device), labels[part].to(device), steps, guidance=guidance, precompute=precompute
        ).cpu()
        for part in torch.arange(len(labels)).split(batch)
    ]
    return torch.cat(parts) if parts else z
