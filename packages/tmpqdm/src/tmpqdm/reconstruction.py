"""The optimisation of one unit's variables: rounding of weights, then step sizes of activations.

Rounding: Adam, learning rate 1e-3, loss = sum over dimension 1 and mean over the rest of (y' - y)^2, plus the
regulariser. Steps: Adam, 4e-4 with cosine decay to 0, |y' - y|^2.4, no regulariser. Every bit-width has an optimiser
and a schedule of its own. (BRECQ, arXiv 2102.05426; Q-Diffusion; TMPQ-DM.)
"""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tmpqdm.quantisers import LearnedStep
from tmpqdm.rounding import WEIGHT, JointRounding, SoftRounding, regulariser, temperature

ROUNDING_RATE, STEP_RATE = 1e-3, 4e-4
WEIGHT_POWER, STEP_POWER = 2.0, 2.4
REACH = 4.0
"""a learned step stays within a factor of this of where it began: the rate is absolute, small steps would cross zero"""


def reconstruction_loss(
    found: Float[Tensor, "batch channels *rest"], target: Float[Tensor, "batch channels *rest"], power: float = 2.0
) -> Float[Tensor, ""]:
    """Sum over dimension 1, mean over all others, of |found - target|^power."""
    difference = found.float() - target.float()
    errors = difference.square() if power == 2 else difference.abs().pow(power)
    return errors.sum(1).mean()


def learn_rounding(
    parts: Sequence[SoftRounding],
    predict: Callable[[Sequence[Tensor], Int[Tensor, " batch"]], Tensor],
    targets: Float[Tensor, "samples channels *rest"],
    batches: Iterable[Int[Tensor, " batch"]],
    iterations: int,
    *,
    rate: float = ROUNDING_RATE,
    weight: float = WEIGHT,
    observe: Callable[[int, float], None] | None = None,
) -> None:
    """Optimises the rounding variables of `parts` in place.

    Args:
        predict: (soft weights in the order of `parts`, sample indices) -> outputs of the unit.
        batches: `iterations` lists of sample indices.
        observe: called after every update with (step from 1, loss).
    """
    joint = JointRounding(parts)
    optimiser = torch.optim.Adam([joint.alpha], lr=rate)
    for step, index in zip(range(1, iterations + 1), batches, strict=False):
        with torch.enable_grad():
            soft = joint.weights()
            loss = reconstruction_loss(predict(soft, index), targets[index], WEIGHT_POWER)
            gradients = torch.autograd.grad(loss, soft)
        beta = temperature(step, iterations)
        joint.alpha.grad = joint.gradient(gradients, beta, weight)
        optimiser.step()
        if observe is not None:
            total = loss.detach() + (0 if beta is None else regulariser(joint.h, beta, weight))
            observe(step, float(total))


def learn_steps(
    steps: Sequence[LearnedStep],
    predict: Callable[[Int[Tensor, " batch"]], Tensor],
    targets: Float[Tensor, "samples channels *rest"],
    batches: Iterable[Int[Tensor, " batch"]],
    iterations: int,
    *,
    rate: float = STEP_RATE,
    observe: Callable[[int, float], None] | None = None,
) -> None:
    """Optimises the step sizes in place; zero points stay."""
    start = torch.stack([step.start.delta for step in steps])
    deltas, low, high = start.clone(), start / REACH, start * REACH
    optimiser = torch.optim.Adam([deltas], lr=rate)
    for step, index in zip(range(iterations), batches, strict=False):
        optimiser.param_groups[0]["lr"] = rate * (1 + math.cos(math.pi * step / iterations)) / 2
        for learned, delta in zip(steps, deltas.unbind(), strict=True):
            learned.delta = delta.detach().requires_grad_()
        with torch.enable_grad():
            loss = reconstruction_loss(predict(index), targets[index], STEP_POWER)
            gradients = torch.autograd.grad(loss, [learned.delta for learned in steps], allow_unused=True)
        deltas.grad = torch.stack([deltas.new_zeros(()) if g is None else g for g in gradients])
        optimiser.step()
        torch.clamp(deltas, low, high, out=deltas)
        if observe is not None:
            observe(step + 1, float(loss.detach()))
    for learned, delta in zip(steps, deltas.unbind(), strict=True):
        learned.delta = delta.clone()


def batches_of(samples: int, size: int, iterations: int, generator: torch.Generator) -> Iterable[Int[Tensor, " batch"]]:
    """Random minibatches without repetition inside one."""
    for _ in range(iterations):
        yield torch.randperm(samples, generator=generator)[:size]
