"""The stage "select": PPO on the papercore training loop. The network is frozen; the selector learns."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from papercore.errors import InputError
from papercore.training import Method, TrainConfig, TrainResult, train
from torch import Tensor, nn
from torch.utils.data import Dataset

from prance.executor import Path as EnginePath
from prance.ppo import (
    PPOConfig,
    RewardConfig,
    actor_loss,
    exploration,
    gae,
    log_probability,
    normalised,
    probability_ratio,
    td_targets,
)
from prance.rollout import Rollout, result_to_go_rollout
from prance.selector import Selector
from prance.supernet import MetaViT
from prance.tokens import Mean


def update(
    actor: nn.Module,
    critic: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    states: Float[Tensor, "transitions length"],
    actions: Float[Tensor, "transitions actions"],
    advantage: Float[Tensor, " transitions"],
    target: Float[Tensor, " transitions"],
    std: float,
    config: PPOConfig,
) -> None:
    """All passes over one rollout; old probabilities are those of the actor at the start."""
    with torch.no_grad():
        old = log_probability(actions, actor(states), std)
    for _ in range(config.epochs):
        optimizer.zero_grad()
        losses(actor(states), critic(states), actions, old, advantage, target, std, config).backward()
        for net in (actor, critic):
            nn.utils.clip_grad_norm_(net.parameters(), config.clip_norm)
        optimizer.step()


def losses(
    mean: Tensor,
    value: Tensor,
    actions: Tensor,
    old: Tensor,
    advantage: Tensor,
    target: Tensor,
    std: float,
    config: PPOConfig,
) -> Float[Tensor, ""]:
    """Actor's and critic's loss, which share no weight."""
    ratio = probability_ratio(log_probability(actions, mean, std), old, config.joint_ratio)
    policy = actor_loss(ratio, advantage, std, actions.shape[-1], config)
    return policy + (value - target).square().mean()


@dataclasses.dataclass(frozen=True)
class Budget:
    """A hard budget on the mean MACs, kept by a Lagrange multiplier on the price of MACs."""

    share: float
    """of the largest subnet's MACs"""
    rate: float = 0.05
    """how fast the multiplier moves: lambda <- max(0, lambda + rate (mean MACs / budget - 1))"""

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise InputError("budget", found=self.share, expected="a share of the largest subnet's MACs in (0, 1]")
        if not 0 < self.rate < float("inf"):
            raise InputError("field rate", found=self.rate, expected="above 0")


class Selection(Method):
    """PPO as a method of the training loop: an optimiser step is a pass over the rollout, `epochs` passes share one.

    Args:
        net: the frozen network.
        selector: learns; the same object must be given to `train`.
        budget: keep the mean MACs at a share, by moving the price `flops_coef` from its value in `rewards`.
        conditioned: range of budgets to draw from, for a selector that is told its budget.
        make_rollout: instead of the network's, for tests.
    """

    def __init__(
        self,
        net: MetaViT,
        selector: Selector,
        config: PPOConfig | None = None,
        rewards: RewardConfig | None = None,
        *,
        budget: Budget | None = None,
        conditioned: tuple[float, float] = (0.2, 1.0),
        path: EnginePath = "packed",
        mean: Mean = "mean",
        delayed: bool = False,
        make_rollout: Callable[..., Rollout] = result_to_go_rollout,
    ) -> None:
        self.net = net.eval().requires_grad_(False)
        self.config, self.rewards, self.budget = config or PPOConfig(), rewards or RewardConfig(), budget
        self.conditioned, self.path, self.delayed = conditioned, path, delayed
        self.mean: Mean = mean
        self.make_rollout, self.selector = make_rollout, selector
        self.epoch, self.updates = 0, 0
        self.price = self.rewards.flops_coef
        self.buffer: dict[str, Tensor] = {}
        self.report: dict[str, float] = {}

    @property
    def std(self) -> float:
        return exploration(self.config, self.updates)

    def begin_step(self, model: nn.Module, step: int) -> None:
        assert isinstance(model, Selector)
        self.selector = model

    def losses(self, model: nn.Module, batch: Any, generator: torch.Generator) -> Iterator[Tensor]:
        if self.epoch == 0:
            self.collect(batch, generator)
        b = self.buffer
        mean, value = model(b["states"])
        yield losses(mean, value, b["actions"], b["old"], b["advantage"], b["target"], self.std, self.config)

    @torch.no_grad()
    def collect(self, batch: Any, generator: torch.Generator) -> None:
        """A new rollout and what the passes over it need."""
        images, labels, target_correct = batch
        selector, config = self.selector, self.config
        self.net.to(images.device)
        budget = None
        if selector.budget:
            low, high = self.conditioned
            draws = torch.rand(len(images), generator=generator, device=generator.device).to(images.device)
            budget = low + (high - low) * draws
        rollout = self.make_rollout(
            self.net,
            selector,
            images,
            labels,
            target_correct,
            std=self.std,
            generator=generator,
            rewards=dataclasses.replace(self.rewards, flops_coef=self.price),
            budget=budget,
            path=self.path,
            mean=self.mean,
            delayed=self.delayed,
            observe=selector.normalise,
        )
        values = torch.stack([selector.critic(states) for states in rollout.states])
        following = torch.cat([values[1:], values[-1:]])
        target, delta = td_targets(rollout.rewards.to(values), values, following, config.gamma)
        advantage = normalised(gae(delta, config.gamma, config.lam))
        states, actions = rollout.states.flatten(0, 1), rollout.actions.flatten(0, 1)
        self.buffer = {
            "states": states,
            "actions": actions,
            "old": log_probability(actions, selector.actor(states), self.std),
            "advantage": advantage.flatten(),
            "target": target.flatten(),
        }
        cost = rollout.cost.mean()
        self.report = {
            "reward": float(rollout.rewards[-1].mean()),
            "accuracy": float(rollout.correct.double().mean()),
            "cost": float(_averaged(cost)),
        }

    def after_backward(self, model: nn.Module, step: int) -> None:
        assert isinstance(model, Selector)
        for net in (model.actor, model.critic):
            nn.utils.clip_grad_norm_(net.parameters(), self.config.clip_norm)

    def after_step(self, model: nn.Module, step: int) -> Mapping[str, float | Tensor]:
        self.epoch += 1
        if self.epoch == self.config.epochs:
            self.epoch, self.updates, self.buffer = 0, self.updates + 1, {}
            if self.budget is not None:
                excess = self.report["cost"] / self.budget.share - 1
                self.price = max(0.0, self.price + self.budget.rate * excess)
        return {**self.report, "price": self.price, "std": self.std}

    def optimizer(self, model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
        assert isinstance(model, Selector)
        groups = [
            {"params": list(model.actor.parameters()), "lr_scale": 1.0},
            {"params": list(model.critic.parameters()), "lr_scale": self.config.critic_factor},
        ]
        return torch.optim.Adam(groups, lr=self.config.actor_learning_rate, eps=self.config.adam_eps)

    def state(self) -> Mapping[str, Tensor]:
        numbers = torch.tensor([self.epoch, self.updates, self.price], dtype=torch.float64)
        report = torch.tensor([self.report[name] for name in sorted(self.report)], dtype=torch.float64)
        return {"numbers": numbers, "report": report, **self.buffer}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        kept = dict(tensors)
        epoch, updates, price = kept.pop("numbers").tolist()
        self.epoch, self.updates, self.price = int(epoch), int(updates), price
        report = kept.pop("report").tolist()
        self.report = dict(zip(("accuracy", "cost", "reward"), report, strict=len(report) > 0))
        device = next(self.selector.parameters()).device
        self.buffer = {name: value.to(device) for name, value in kept.items()}


def _averaged(value: Tensor) -> Tensor:
    """The mean over the processes, so that all of them move the price alike."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        value = value.clone()
        torch.distributed.all_reduce(value)
        value = value / torch.distributed.get_world_size()
    return value


class WithTargets(Dataset[tuple[Tensor, int, bool]]):
    """Samples (image, label) with whether the uncompressed network is right."""

    def __init__(self, samples: Dataset[Any], correct: Bool[Tensor, " samples"]) -> None:
        self.samples, self.correct = samples, correct

    def __len__(self) -> int:
        return len(self.correct)

    def __getitem__(self, index: int) -> tuple[Tensor, int, bool]:
        image, label = self.samples[index]
        return image, label, bool(self.correct[index])


def select(
    net: MetaViT,
    selector: Selector,
    samples: Dataset[Any],
    target_correct: Bool[Tensor, " samples"],
    out: Path,
    *,
    rollouts: int,
    images: int = 256,
    seed: int = 0,
    device: str = "auto",
    resume: bool = True,
    method: Selection | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> TrainResult:
    """Trains the selector for so many rollouts of so many images; see `papercore.training.train` for the folder."""
    method = method or Selection(net, selector)
    config = TrainConfig(
        steps=rollouts * method.config.epochs,
        batch_size=images,
        learning_rate=method.config.actor_learning_rate,
        weight_decay=0.0,
        schedule="constant",
        clip_norm=None,
        checkpoint_every=10 * method.config.epochs,
        log_every=method.config.epochs,
        seed=seed,
    )
    described = {
        "ppo": dataclasses.asdict(method.config),
        "rewards": dataclasses.asdict(method.rewards),
        "budget": None if method.budget is None else dataclasses.asdict(method.budget),
        "delayed": method.delayed,
        **(provenance or {}),
    }
    return train(
        selector,
        WithTargets(samples, target_correct),
        method,
        config,
        out,
        device=device,
        resume=resume,
        label="select",
        provenance=described,
    )
