"""A small class-conditional DiT on handwritten digits: the model every other command can be tried on."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from papercore.data.digits import CLASSES, digits
from papercore.diffusion import add_noise, linear_alphas_cumprod
from papercore.training import TrainConfig, TrainResult, train
from torch import Tensor, nn

from qdit.calibration import predict_noise
from qdit.pipeline import save_pretrained


@dataclasses.dataclass(frozen=True)
class ModelSize:
    """Size of the digits DiT: 8 x 8 pixels in patches of 2 are 16 tokens."""

    width: int = 64
    depth: int = 3
    heads: int = 4


NULL_SHARE = 0.1
"""share of samples trained without a label, for classifier-free guidance"""

DEFAULT = TrainConfig(
    steps=2000,
    batch_size=64,
    learning_rate=2e-3,
    schedule="one-cycle",
    ema=0.995,
    checkpoint_every=200,
    log_every=100,
)


def build_digits_dit(size: ModelSize, seed: int) -> DiTTransformer2DModel:
    """An untrained model. The loss drops labels, not the model, so that a step is a function of its seed."""
    torch.manual_seed(seed)
    model = DiTTransformer2DModel(
        num_attention_heads=size.heads,
        attention_head_dim=size.width // size.heads,
        in_channels=1,
        out_channels=1,
        num_layers=size.depth,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=CLASSES,
        norm_eps=1e-6,
    )
    for block in model.transformer_blocks:
        block.norm1.emb.class_embedder.dropout_prob = 0  # pyright: ignore[reportAttributeAccessIssue]
        # adaLN-Zero: every block starts as the identity (DiT, arXiv 2212.09748, section 3.2)
        nn.init.zeros_(block.norm1.linear.weight)  # pyright: ignore[reportArgumentType]
        nn.init.zeros_(block.norm1.linear.bias)  # pyright: ignore[reportArgumentType]
    for layer in (model.proj_out_1, model.proj_out_2):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return model


def noise_loss(model: nn.Module, batch: Any, generator: torch.Generator) -> Tensor:
    """Mean squared error of the predicted noise at a random timestep, with a share of labels dropped."""
    x, y = batch
    device = x.device
    t = torch.randint(1000, (len(x),), generator=generator, device=device)
    noise = torch.randn(x.shape, generator=generator, device=device)
    dropped = torch.rand(len(x), generator=generator, device=device) < NULL_SHARE
    noisy = add_noise(x, noise, t, linear_alphas_cumprod().to(device))
    return (predict_noise(model, noisy, t, torch.where(dropped, CLASSES, y)) - noise).square().mean()


def train_digits(
    out: Path,
    config: TrainConfig = DEFAULT,
    size: ModelSize | None = None,
    *,
    device: str = "auto",
    resume: bool = True,
    label: str = "qdit train",
) -> TrainResult:
    """Trains (or goes on training) in `out/run` and writes the averaged model to `out`."""
    size = size or ModelSize()
    images, labels = digits("train")
    result = train(
        build_digits_dit(size, config.seed),
        torch.utils.data.TensorDataset(images, labels),
        noise_loss,
        config,
        Path(out) / "run",
        device=device,
        resume=resume,
        label=label,
        provenance={"model": dataclasses.asdict(size), "data": "digits"},
    )
    if result.is_main:
        save_pretrained(result.model, Path(out))
    return result
