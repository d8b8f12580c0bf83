"""Proximal policy optimisation of the selector (PRANCE; PPO: arXiv 1707.06347; GAE: arXiv 1506.02438).

Shapes are step-major: T decisions of B images. Advantages run within an image's T steps and never across images.
"""

import dataclasses
import math

import torch
from jaxtyping import Bool, Float
from papercore.errors import InputError
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """What a decision is worth: right answers, less what they cost."""

    flops_coef: float = 0.187
    """price of the largest subnet's MACs; cheaper subnets pay their share. The default is what the published
    coefficient asks of the tiny network"""
    prune_coef: float = 0.1
    """price of the share of tokens that pruning keeps"""
    merge_coef: float = 0.1
    """price of the share of tokens that merging leaves"""
    over_budget: float = 2.0
    """price of the MACs above an image's budget, for selectors that are told one"""


@dataclasses.dataclass(frozen=True)
class PPOConfig:
    """Settings of the published code."""

    gamma: float = 0.9
    """discount"""
    lam: float = 0.9
    """lambda of the generalised advantage"""
    clip: float = 0.2
    """clip range of the probability ratio"""
    epochs: int = 10
    """passes over a rollout"""
    actor_learning_rate: float = 1e-4
    """of Adam"""
    critic_factor: float = 50.0
    """learning rate of the critic over the actor's"""
    adam_eps: float = 1e-5
    """of Adam"""
    clip_norm: float = 0.5
    """largest gradient norm, of actor and critic each"""
    entropy_coef: float = 0.01
    """price of a narrow policy; without effect on the weights, because the deviation is not learned"""
    joint_ratio: bool = False
    """one probability ratio for the whole action, as textbooks have it, instead of one for each of its numbers"""
    std: float = 0.3
    """deviation of the policy at the start"""
    std_floor: float = 0.05
    """where it ends"""
    std_updates: int = 8000
    """rollouts after which it would reach 0"""

    def __post_init__(self) -> None:
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"field {name}", found=getattr(self, name), expected="in [0, 1]")
        for name in (
            "clip",
            "actor_learning_rate",
            "critic_factor",
            "adam_eps",
            "clip_norm",
            "std",
            "std_floor",
            "std_updates",
            "epochs",
        ):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"field {name}", found=getattr(self, name), expected="above 0")


def exploration(config: PPOConfig, updates: int) -> float:
    """Deviation of the policy after so many rollouts."""
    return max(config.std_floor, config.std * (1 - updates / config.std_updates))


def reward(
    correct: Bool[Tensor, " *batch"],
    target_correct: Bool[Tensor, " *batch"],
    cost: Float[Tensor, " *batch"],
    prune: Float[Tensor, " *batch"],
    merge: Float[Tensor, " *batch"],
    config: RewardConfig | None = None,
    *,
    mode: str = "prune_merge",
    budget: Float[Tensor, " *batch"] | None = None,
) -> Float[Tensor, " *batch"]:
    """A - flops_coef cost - prune_coef p - merge_coef m (published code).

    A is 1 when the answer is as right as the reference model's (images it gets wrong always score), else whether the
    answer is right.

    Args:
        target_correct: of the uncompressed network.
        cost: MACs over the largest subnet's. In the published form `flops_coef` is 0.008 and this is MACs / 1e8.
        prune, merge: keep ratios of this decision; only those of the mode count.
        budget: in the unit of the cost; what is above it costs `over_budget` more.
    """
    config = config or RewardConfig()
    value = ((correct == target_correct) | correct).double() - config.flops_coef * cost.double()
    if mode in ("prune", "prune_merge"):
        value = value - config.prune_coef * prune.double()
    if mode in ("merge", "prune_merge"):
        value = value - config.merge_coef * merge.double()
    if budget is not None:
        value = value - config.over_budget * (cost.double() - budget.double()).clamp(min=0)
    return value


def td_targets(
    rewards: Float[Tensor, "steps batch"],
    values: Float[Tensor, "steps batch"],
    next_values: Float[Tensor, "steps batch"],
    gamma: float,
) -> tuple[Float[Tensor, "steps batch"], Float[Tensor, "steps batch"]]:
    """(r + gamma V(s') (1 - done), that less V(s)); the last step is done."""
    alive = torch.ones_like(rewards)
    alive[-1] = 0
    target = rewards + gamma * next_values * alive
    return target, target - values


def gae(delta: Float[Tensor, "steps batch"], gamma: float, lam: float) -> Float[Tensor, "steps batch"]:
    """A_t = delta_t + gamma lambda A_{t+1} within each image's steps."""
    out = torch.empty_like(delta)
    running = torch.zeros_like(delta[0])
    for step in reversed(range(len(delta))):
        running = delta[step] + gamma * lam * running
        out[step] = running
    return out


def normalised(advantage: Float[Tensor, "*shape"], eps: float = 1e-5) -> Float[Tensor, "*shape"]:
    """Mean 0, unbiased deviation 1; over all processes when there are several."""
    count, total, square = _sums(advantage)
    mean = total / count
    variance = (square - count * mean.square()).clamp(min=0) / (count - 1).clamp(min=1)
    return ((advantage - mean) / (variance.sqrt() + eps)).to(advantage)


def _sums(values: Tensor) -> Tensor:
    wide = values.double()
    sums = torch.stack([wide.new_tensor(float(values.numel())), wide.sum(), wide.square().sum()])
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        sums = sums.float() if sums.device.type == "mps" else sums
        torch.distributed.all_reduce(sums)
    return sums


def log_probability(
    action: Float[Tensor, "*batch actions"], mean: Float[Tensor, "*batch actions"], std: float
) -> Float[Tensor, "*batch actions"]:
    """Of every number of the action under Normal(mean, std)."""
    return -((action - mean).square()) / (2 * std**2) - math.log(std) - 0.5 * math.log(2 * math.pi)


def probability_ratio(
    new: Float[Tensor, "*batch actions"], old: Float[Tensor, "*batch actions"], joint: bool
) -> Float[Tensor, "*batch ratios"]:
    """Of the new policy over the old one, for each number of the action or for all of it."""
    difference = new - old
    return (difference.sum(-1, keepdim=True) if joint else difference).exp()


def actor_loss(
    ratio: Float[Tensor, "batch ratios"],
    advantage: Float[Tensor, " batch"],
    std: float,
    actions: int,
    config: PPOConfig,
) -> Float[Tensor, ""]:
    """-mean min(ratio A, clip(ratio) A) less the entropy of the policy, times its coefficient.

    The entropy is the sum over the action's numbers.
    """
    weight = advantage[:, None]
    clipped = ratio.clamp(1 - config.clip, 1 + config.clip)
    entropy = actions * (0.5 + 0.5 * math.log(2 * math.pi) + math.log(std))
    return -torch.minimum(ratio * weight, clipped * weight).mean() - config.entropy_coef * entropy
