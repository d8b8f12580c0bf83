"""Training of the small UNets that every other command can be tried on: handwritten digits, and CIFAR-10."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from papercore.errors import InputError
from papercore.images import images_from_uint8
from papercore.training import TrainConfig, TrainResult, train
from torch import Tensor, nn

Network = Literal["digits", "cifar10"]

DIGITS = TrainConfig(
    steps=1500, batch_size=96, learning_rate=3e-3, schedule="one-cycle", ema=0.99, checkpoint_every=250, log_every=100
)
"""the digits UNet: two minutes on a core"""

CIFAR10 = TrainConfig(
    steps=20000,
    batch_size=128,
    learning_rate=4e-4,
    schedule="cosine",
    warmup=500,
    ema=0.9995,
    mixed_precision="bf16",
    checkpoint_every=1000,
    log_every=100,
)
"""the CIFAR-10 UNet, on a GPU"""


def build_digits_unet(seed: int) -> UNet2DModel:
    """176 849 parameters, 51 layers, one attention block a side and one in the middle, for 8x8 pictures."""
    torch.manual_seed(seed)
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=None,
    )


def build_cifar_unet(seed: int, channels: tuple[int, ...] = (96, 192, 192)) -> UNet2DModel:
    """A UNet for 32x32 pictures with attention at 16x16."""
    torch.manual_seed(seed)
    levels = len(channels)
    return UNet2DModel(
        sample_size=32,
        layers_per_block=2,
        block_out_channels=channels,
        down_block_types=tuple("AttnDownBlock2D" if i == 1 else "DownBlock2D" for i in range(levels)),
        up_block_types=tuple("AttnUpBlock2D" if i == levels - 2 else "UpBlock2D" for i in range(levels)),
        attention_head_dim=None,
        dropout=0.1,
    )


class Flipped(torch.utils.data.Dataset[tuple[Tensor]]):
    """uint8 pictures [n, h, w, c] as [-1, 1], half of them mirrored (torch's global generator)."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor]:
        picture = images_from_uint8(self.images[index : index + 1])[0]
        return (picture.flip(-1) if torch.rand(()) < 0.5 else picture,)


def noise_loss(scheduler: Any) -> Callable[[nn.Module, Any, torch.Generator], Tensor]:
    """Mean squared error of the predicted noise at a random timestep (DDPM, arXiv 2006.11239, equation 14)."""
    alphas = scheduler.alphas_cumprod

    def loss(model: nn.Module, batch: Any, generator: torch.Generator) -> Tensor:
        x = batch[0]
        t = torch.randint(len(alphas), (len(x),), generator=generator, device=x.device)
        noise = torch.randn(x.shape, generator=generator, device=x.device)
        a = alphas.to(x.device)[t][:, None, None, None]
        return (model(a.sqrt() * x + (1 - a).sqrt() * noise, t, return_dict=False)[0] - noise).square().mean()

    return loss


def train_unet(
    out: Path,
    network: Network = "digits",
    config: TrainConfig | None = None,
    *,
    data: Path | None = None,
    channels: tuple[int, ...] = (96, 192, 192),
    device: str = "auto",
    resume: bool = True,
    label: str = "tmpqdm train",
) -> TrainResult:
    """Trains, or goes on training, in `out/run`; writes the averaged network and its schedule to `out`, a diffusers
    folder that `loading.load_model` reads.

    Args:
        data: folder with images/cifar10, for that network.
        channels: of the CIFAR-10 UNet's levels.

    Raises:
        InputError: the data are missing.
    """
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    if network not in ("digits", "cifar10"):
        raise InputError("network", found=network, expected="digits or cifar10")
    scheduler = DDPMScheduler()
    dataset: torch.utils.data.Dataset[Any]
    if network == "digits":
        from papercore.data.digits import digits

        config = config or DIGITS
        model = build_digits_unet(config.seed)
        dataset = torch.utils.data.TensorDataset(digits("all").images)
    else:
        from papercore.data.cifar import cifar

        if data is None:
            raise InputError("--data", found="nothing", expected="a folder with images/cifar10")
        if len(channels) < 2 or any(c < 32 or c % 32 for c in channels):
            raise InputError("channels", found=channels, expected="at least two multiples of 32")
        config = config or CIFAR10
        model = build_cifar_unet(config.seed, channels)
        dataset = Flipped(cifar(data, "train").images)
    result = train(
        model,
        dataset,
        noise_loss(scheduler),
        config,
        Path(out) / "run",
        device=device,
        resume=resume,
        label=label,
        provenance={"network": network, "channels": list(channels) if network == "cifar10" else None},
    )
    if result.is_main:
        trained: Any = result.model
        trained.save_pretrained(out, safe_serialization=True)
        scheduler.save_pretrained(Path(out) / "scheduler")
    return result


def reduced(config: TrainConfig, steps: int) -> TrainConfig:
    """The same training in fewer steps."""
    return dataclasses.replace(config, steps=steps, checkpoint_every=min(config.checkpoint_every, steps))
