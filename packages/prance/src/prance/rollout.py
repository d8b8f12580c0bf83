"""Result-to-go: every decision is paid by the outcome of a whole run in which later groups stay at the default.

The run is kept at every decision, so that a step costs its own group and the groups after it, and only its own group
is kept: with 12 blocks in groups of 3, 3 + 9 + 6 + 3 block evaluations instead of four times 12 (PRANCE, section on
result-to-go; the reuse is ours).
"""

import dataclasses

import torch
from jaxtyping import Bool, Float, Int
from papercore.errors import WorkError
from torch import Tensor

from prance.decision import Decision, decode_action
from prance.executor import Path, Run, make_engine
from prance.macs import macs
from prance.ppo import RewardConfig, reward
from prance.selector import Selector
from prance.supernet import MetaViT
from prance.tokens import Mean


@dataclasses.dataclass(frozen=True)
class Rollout:
    """Transitions of a batch of images, step-major."""

    states: Float[Tensor, "steps batch length"]
    """as actor and critic see them"""
    actions: Float[Tensor, "steps batch actions"]
    rewards: Float[Tensor, "steps batch"]
    decision: Decision
    """of the last step: what the images were given"""
    correct: Bool[Tensor, " batch"]
    cost: Float[Tensor, " batch"]
    """MACs of that decision over the largest subnet's"""


@torch.no_grad()
def result_to_go_rollout(
    net: MetaViT,
    selector: Selector,
    images: Float[Tensor, "batch channels height width"],
    labels: Int[Tensor, " batch"],
    target_correct: Bool[Tensor, " batch"],
    *,
    std: float,
    generator: torch.Generator,
    rewards: RewardConfig | None = None,
    budget: Float[Tensor, " batch"] | None = None,
    path: Path = "packed",
    mean: Mean = "mean",
    reuse: bool = True,
    delayed: bool = False,
    observe: bool = False,
) -> Rollout:
    """Takes one decision after another for every image and pays each.

    Args:
        target_correct: whether the uncompressed network is right.
        std: of the policy; actions are Normal(mean, std), clamped to [0, 1].
        budget: of every image, for a selector that is told one; also what `over_budget` is measured from.
        path: how the network is run.
        reuse: keep the run at every decision; False runs the whole network for every step, with the same result.
        delayed: pay accuracy and MACs with the last decision only, as without result-to-go.
        observe: take the states into the selector's running mean and deviation first.

    Raises:
        WorkError: logits or rewards that are not finite.
    """
    rewards = rewards or RewardConfig()
    space, engine = net.space, make_engine(net, path, mean)
    default = Decision.largest(space, len(images))
    full = macs(net, default[:1]).double()
    run = Run.start(engine, images, default)
    kept: dict[str, list[Tensor]] = {"states": [], "actions": [], "rewards": []}
    decision, correct, cost = default, torch.empty(0), torch.empty(0)
    for point in range(len(space.points)):
        run, state = run.attended()
        assert state is not None
        if observe:
            selector.observe(state)
        prepared = selector.prepared(state, budget)
        mu = selector.actor(prepared)
        noise = torch.randn(mu.shape, generator=generator, device=generator.device).to(mu)
        action = (mu + std * noise).clamp(0, 1)
        ratio, embed, prune, merge = decode_action(action, space, selector.mode)
        decision = decision.replaced(point, embed, ratio, prune, merge)
        run = run.decided(decision)
        logits = run.finish() if reuse else _whole(engine, images, default, decision, point)
        if not bool(torch.isfinite(logits).all()):
            bad = (~torch.isfinite(logits).all(1)).nonzero().flatten().tolist()
            raise WorkError(f"logits of images {bad[:10]} of the batch are not finite")
        cost = macs(net, decision).double() / full
        correct = (logits.argmax(1) == labels.to(logits.device)).cpu()
        paid = reward(
            correct,
            target_correct.cpu(),
            cost,
            prune,
            merge,
            rewards,
            mode=selector.mode,
            budget=None if budget is None else budget.cpu(),
        )
        if delayed and point < len(space.points) - 1:
            paid = reward(
                torch.zeros_like(correct),
                torch.ones_like(correct),
                torch.zeros_like(cost),
                prune,
                merge,
                rewards,
                mode=selector.mode,
            )
        if not bool(torch.isfinite(paid).all()):
            raise WorkError("a reward is not finite")
        for name, value in (("states", prepared), ("actions", action), ("rewards", paid.to(action))):
            kept[name].append(value)
    stacked = {name: torch.stack(values) for name, values in kept.items()}
    return Rollout(**stacked, decision=decision, correct=correct, cost=cost)


def _whole(engine: object, images: Tensor, default: Decision, decision: Decision, point: int) -> Tensor:
    """The network run from the start: groups are decided when they are reached, those after `point` not at all."""
    run = Run.start(engine, images, default)  # pyright: ignore[reportArgumentType]
    for _ in range(point + 1):
        run, _ = run.attended()
        run = run.decided(decision)
    return run.finish()
