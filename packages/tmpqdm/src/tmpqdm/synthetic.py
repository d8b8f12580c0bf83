"""Small networks and layers with random weights, and the claims that need no trained network.

R4  splitting a decoder's shortcut lowers its error where the part with the small range matters
R5  a mixture taken from the solver is as good as the same mixture calibrated by itself
R6  learned rounding and step sizes beat rounding to nearest and whole ranges at few bits
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import Tensor, nn

from tmpqdm.calibration import collect_calibration
from tmpqdm.layers import QuantLayer
from tmpqdm.quantisers import LearnedStep, Step, tensor_parameters
from tmpqdm.reconstruction import batches_of, learn_rounding, learn_steps
from tmpqdm.rounding import SoftRounding
from tmpqdm.solver import PrecisionSolver

SKIP_WEIGHTS = (0.2, 1.0, 4.0, 10.0)


def tiny_unet(seed: int = 0) -> UNet2DModel:
    """An untrained UNet for 8x8 pictures: attention, four split shortcuts, 16 and 32 channels."""
    torch.manual_seed(seed)
    return UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(16, 32),
        norm_num_groups=8, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), attention_head_dim=None,
    )  # fmt: skip


def tiny_text_unet(seed: int = 0) -> UNet2DConditionModel:
    """An untrained UNet with cross-attention to a text of 12 numbers a token."""
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1, cross_attention_dim=12,
        attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip


def tiny_dit(seed: int = 0) -> DiTTransformer2DModel:
    """An untrained DiT of two blocks for 8x8 pictures of ten classes."""
    torch.manual_seed(seed)
    return DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=1, out_channels=1, num_layers=2, sample_size=8,
        patch_size=2, num_embeds_ada_norm=10,
    )  # fmt: skip


def split_gain(skip_weight: float, bits: int = 6, seed: int = 0) -> float:
    """R4: squared error without splitting over that with it, for a 1x1 shortcut of 64 + 64 channels.

    The main branch reaches 6, the skip branch 0.3; the skip branch's weights are `skip_weight` times the others.
    """
    generator = torch.Generator().manual_seed(seed)
    halves, out = 64, 64
    x = torch.cat([torch.rand(8, halves, 8, 8, generator=generator) * 2 * reach - reach for reach in (6.0, 0.3)], 1)
    conv = nn.Conv2d(2 * halves, out, 1, bias=False)
    with torch.no_grad():
        weight = torch.randn(out, 2 * halves, 1, 1, generator=generator)
        weight[:, halves:] *= skip_weight
        conv.weight.copy_(weight)
        exact = conv(x)
        errors = []
        for split in (None, halves):
            layer = QuantLayer(conv, split)
            layer.round_to_nearest(bits)
            parts = (x,) if split is None else (x[:, :split], x[:, split:])
            layer.set_steps(tuple(Step(*tensor_parameters(p, bits, symmetric=True), bits, True) for p in parts))
            layer.use(w=bits, a=bits)
            errors.append(float((layer(x) - exact).square().mean()))
    return errors[0] / errors[1]


class MixtureErrors(NamedTuple):
    """Mean relative squared error of the units' outputs at one random mixture of bits."""

    solver: float
    """taken from the solver"""
    alone: float
    """calibrated for this mixture alone"""
    nearest: float
    """rounded to nearest, whole ranges: what both start from"""


def mixture_errors(
    *,
    iterations: int = 60,
    bits: tuple[int, ...] = (6, 4),
    samples: int = 8,
    seed: int = 0,
    rounding_rate: float = 5e-2,
    step_rate: float = 2e-3,
    model: nn.Module | None = None,
) -> MixtureErrors:
    """R5. The rates suit few iterations; those of the paper suit thousands."""
    model = tiny_unet(seed) if model is None else model
    data = collect_calibration(model, DDPMScheduler(), samples=samples, steps=20, use=8, seed=seed)
    solver = PrecisionSolver.from_model(model, bits=bits)
    mixture = random_mixture(solver, seed + 1)
    found = []
    for only, count in ((None, iterations), (mixture, iterations), (None, 0)):
        solver.calibrate(
            data, weight_iters=count, act_iters=count, batch_size=16, seed=seed, rounding_rate=rounding_rate,
            step_rate=step_rate, mixture=only,
        )  # fmt: skip
        errors = solver.errors(data, mixture)
        found.append(sum(errors.values()) / len(errors))
    return MixtureErrors(*found)


def random_mixture(solver: PrecisionSolver, seed: int) -> dict[str, dict[str, int]]:
    """Uniformly drawn bits of every gene that is not pinned."""
    generator = torch.Generator().manual_seed(seed)

    def draw() -> int:
        return solver.bits[int(torch.randint(len(solver.bits), (), generator=generator))]

    return {op.name: {gene: op.pinned.get(gene) or draw() for gene in op.genes} for op in solver.ops}


def learned_gain(bits: int = 4, *, iterations: int = 600, rate: float = 1e-2, seed: int = 0) -> float:
    """R6: squared error on fresh inputs of nearest rounding and whole ranges over that of learned rounding and steps.

    A 3x3 convolution of 16 channels on inputs whose channels and neighbours are correlated.
    """
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(16, 16, generator=generator) / 4
    smooth = torch.full((16, 1, 3, 3), 1 / 9)

    def inputs(count: int) -> Tensor:
        x = torch.einsum("oc,nchw->nohw", mix, torch.randn(count, 16, 10, 10, generator=generator))
        return F.conv2d(x, smooth, groups=16) * 3

    weight = torch.randn(16, 16, 3, 3, generator=generator) / 12
    conv = nn.Conv2d(16, 16, 3, padding=1, bias=False)
    with torch.no_grad():
        conv.weight.copy_(weight)
    train, fresh = inputs(128), inputs(128)
    targets = F.conv2d(train, weight, padding=1)
    layer = QuantLayer(conv.requires_grad_(False))
    layer.round_to_nearest(bits)
    layer.set_steps((Step(*tensor_parameters(train, bits, symmetric=True), bits, True),))
    layer.use(w=bits, a=bits)
    exact = F.conv2d(fresh, weight, padding=1)
    plain = float((layer(fresh) - exact).square().mean())

    half = layer.halves[bits][0]
    part = SoftRounding(weight, half.delta, half.zero, bits)
    learn_rounding(
        [part], lambda soft, i: F.conv2d(train[i], soft[0], padding=1), targets,
        batches_of(len(train), 32, iterations, generator), iterations, rate=rate,
    )  # fmt: skip
    hard = part.hard()
    step = LearnedStep(layer.step_halves(bits)[0])
    learn_steps(
        [step], lambda i: F.conv2d(step(train[i]), hard, padding=1), targets,
        batches_of(len(train), 32, iterations, generator), iterations, rate=rate,
    )  # fmt: skip
    learned = float((F.conv2d(step.result()(fresh), hard, padding=1) - exact).square().mean())
    return plain / learned


def measure_synthetic(*, iterations: int = 60, seed: int = 0) -> Mapping[str, object]:
    """All three, as plain numbers."""
    mixture = mixture_errors(iterations=iterations, seed=seed)
    return {
        "R4 gain of splitting, by weight of the skip branch": {w: split_gain(w, seed=seed) for w in SKIP_WEIGHTS},
        "R5 error of the solver's mixture": mixture.solver,
        "R5 error of the mixture calibrated alone": mixture.alone,
        "R5 error of the mixture rounded to nearest": mixture.nearest,
        "R6 gain of learning at 4 bits": learned_gain(4, seed=seed),
        "R6 gain of learning at 3 bits": learned_gain(3, seed=seed),
    }
