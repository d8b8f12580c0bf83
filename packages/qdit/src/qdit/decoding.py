"""Latents -> pixels with an autoencoder of diffusers (latent DiTs, arXiv 2212.09748, section 3.1)."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from jaxtyping import Float
from papercore.errors import InputError
from papercore.rundir import read_json
from torch import Tensor

from qdit.weights import component, weight_files

BATCH = 8
"""latents decoded at once; a decoder of 256 x 256 pixels needs about 1 GB for eight"""


def load_decoder(path: Path, channels: int) -> AutoencoderKL:
    """The AutoencoderKL in the folder `path`, for latents of `channels` channels, on the CPU, in evaluation mode.

    `path` may be a pipeline of diffusers that has it as `vae`.

    Raises:
        InputError: a missing, damaged or pickled file, another model, or another number of channels.
    """
    path = component(path, "vae")
    where = path / "config.json"
    config = read_json(where)
    found = config.get("_class_name") if isinstance(config, dict) else config
    if found != "AutoencoderKL":
        raise InputError("_class_name", where=where, found=repr(found), expected="'AutoencoderKL'")
    if config.get("latent_channels", 4) != channels:
        raise InputError(
            "latent_channels", where=where, found=config.get("latent_channels", 4), expected=f"{channels}, as the DiT"
        )
    files = weight_files(path)
    try:
        decoder, notes = AutoencoderKL.from_pretrained(
            path, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise InputError("autoencoder", where=path, found=str(error), expected="a model of diffusers") from error
    if notes["missing_keys"]:
        raise InputError(f"tensor {sorted(notes['missing_keys'])[0]}", where=files[0], found="nothing", expected="one")
    return decoder.eval()


@torch.no_grad()
def decode(
    decoder: AutoencoderKL, latents: Float[Tensor, "n channels height width"]
) -> Float[Tensor, "n colours tall wide"]:
    """Pixels in about [-1, 1], on the CPU; latents are first brought back to the autoencoder's own scale.

    Raises:
        InputError: the decoder gives other than 1 or 3 colours.
    """
    config = decoder.config
    scale: float = config.scaling_factor  # pyright: ignore[reportAttributeAccessIssue]
    shift: float = config.shift_factor or 0.0  # pyright: ignore[reportAttributeAccessIssue]
    parts = [
        decoder.decode(part.to(decoder.device, decoder.dtype) / scale + shift).sample.float().cpu()  # pyright: ignore[reportAttributeAccessIssue]
        for part in latents.split(BATCH)
    ]
    pixels = torch.cat(parts)
    if pixels.shape[1] not in (1, 3):
        raise InputError("colours of the decoder", found=pixels.shape[1], expected="1 or 3")
    return pixels
