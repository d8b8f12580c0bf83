"""The stages "pretrain" and "finetune": the meta-network under random subnets, and under a trained selector."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from papercore.errors import InputError
from papercore.training import Method, TrainConfig, TrainResult, train
from torch import Tensor, nn
from torch.utils.data import Dataset

from prance.decision import Decision, Tokens
from prance.selector import Selector
from prance.supernet import MetaViT
from prance.tokens import Mean


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    """Which subnets a step trains. The published code trains one random subnet a step."""

    largest: bool = True
    """train the largest subnet in every step; the others then learn from its answers"""
    smallest: bool = False
    """train the smallest subnet too (with the largest and two random ones: the sandwich rule of BigNAS)"""
    random: int = 1
    """random subnets a step"""
    within_groups: float = 0.5
    """probability that widths differ inside a group, as a selector's do"""
    tokens: Tokens | None = None
    """also reduce tokens in random subnets, at random keep ratios; none: keep all"""
    distil: float = 0.5
    """share of the loss against the largest subnet's answers, for subnets that follow it"""
    mixup: float = 0.0
    """alpha of mixup (arXiv 1710.09412); 0: none"""

    def __post_init__(self) -> None:
        if self.random < 0 or not (self.largest or self.smallest or self.random):
            raise InputError("field random", found=self.random, expected="at least one subnet a step")
        for name in ("within_groups", "distil"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"field {name}", found=getattr(self, name), expected="in [0, 1]")
        if not 0 <= self.mixup < float("inf"):
            raise InputError("field mixup", found=self.mixup, expected="at least 0")


class Pretrain(Method):
    """Random subnets of one network, a backward pass each."""

    def __init__(self, config: PretrainConfig, mean: Mean = "mean") -> None:
        self.config = config
        self.mean: Mean = mean
        self.passes = int(config.largest) + int(config.smallest) + config.random
        self.space = None

    def begin_step(self, model: nn.Module, step: int) -> None:
        assert isinstance(model, MetaViT)
        self.space = model.space

    def losses(self, model: nn.Module, batch: Any, generator: torch.Generator) -> Iterator[Tensor]:
        config, space = self.config, self.space
        assert space is not None
        images, labels = batch
        images, soft = mixed(images, labels, model, config.mixup, generator)
        teacher = None
        cpu = torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=generator, device=generator.device)))
        for decision in self.decisions(cpu):
            logits = model(images, decision, path="sliced", mean=self.mean)
            value = F.cross_entropy(logits.float(), soft)
            if teacher is not None and config.distil:
                follow = F.kl_div(logits.float().log_softmax(-1), teacher, reduction="batchmean")
                value = (1 - config.distil) * value + config.distil * follow
            if config.largest and teacher is None:
                teacher = logits.detach().float().softmax(-1)
            yield value

    def decisions(self, generator: torch.Generator) -> Iterator[Decision]:
        """Of one step; the first group always runs at the largest choice, as it does under a selector."""
        config, space = self.config, self.space
        assert space is not None
        if config.largest:
            yield Decision.largest(space)
        if config.smallest:
            yield _first_group_largest(Decision.smallest(space))
        for _ in range(config.random):
            drawn = Decision.random(space, generator, tokens=config.tokens, within_groups=config.within_groups)
            yield _first_group_largest(drawn)


def _first_group_largest(decision: Decision) -> Decision:
    space = decision.space
    embed, ratio = decision.embed.clone(), decision.mlp_ratio.clone()
    embed[:, : space.group], ratio[:, : space.group] = space.embed[-1], space.mlp_ratio[-1]
    return dataclasses.replace(decision, embed=embed, mlp_ratio=ratio)


def mixed(
    images: Tensor, labels: Tensor, model: nn.Module, alpha: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Images and soft labels, mixed with those of another order of the batch."""
    classes = getattr(getattr(model, "module", model), "num_classes")  # noqa: B009 - a module's attribute
    soft = F.one_hot(labels, classes).float()
    if not alpha:
        return images, soft
    cpu = torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=generator, device=generator.device)))
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(cpu.get_state())
        share = float(torch.distributions.Beta(alpha, alpha).sample())
    other = torch.randperm(len(images), generator=cpu).to(images.device)
    return share * images + (1 - share) * images[other], share * soft + (1 - share) * soft[other]


class Finetune(Method):
    """The network under a trained, frozen selector: every image runs as it is decided, masked, with gradients.

    Args:
        largest: train the largest subnet in every step too, and let the decided ones follow its answers.
    """

    def __init__(self, selector: Selector, *, largest: bool = True, distil: float = 0.5, mean: Mean = "mean") -> None:
        self.selector = selector.eval().requires_grad_(False)
        self.largest, self.distil = largest, distil
        self.mean: Mean = mean
        self.passes = 2 if largest else 1

    def losses(self, model: nn.Module, batch: Any, generator: torch.Generator) -> Iterator[Tensor]:
        images, labels = batch
        self.selector.to(images.device)
        teacher = None
        if self.largest:
            logits = model(images, path="sliced", mean=self.mean)
            teacher = logits.detach().float().softmax(-1)
            yield F.cross_entropy(logits.float(), labels)
        logits = model(images, path="masked", mean=self.mean, policy=self.selector.policy)
        value = F.cross_entropy(logits.float(), labels)
        if teacher is not None and self.distil:
            follow = F.kl_div(logits.float().log_softmax(-1), teacher, reduction="batchmean")
            value = (1 - self.distil) * value + self.distil * follow
        yield value


def pretrain(
    net: MetaViT,
    samples: Dataset[Any],
    out: Path,
    config: TrainConfig,
    stage: PretrainConfig | None = None,
    *,
    device: str = "auto",
    resume: bool = True,
    provenance: Mapping[str, Any] | None = None,
) -> TrainResult:
    """Trains the meta-network in place; see `papercore.training.train` for the folder."""
    stage = stage or PretrainConfig()
    described = {"pretrain": dataclasses.asdict(stage), "space": dataclasses.asdict(net.space), **(provenance or {})}
    return train(
        net, samples, Pretrain(stage), config, out, device=device, resume=resume, label="pretrain", provenance=described
    )


def finetune(
    net: MetaViT,
    selector: Selector,
    samples: Dataset[Any],
    out: Path,
    config: TrainConfig,
    *,
    device: str = "auto",
    resume: bool = True,
    provenance: Mapping[str, Any] | None = None,
) -> TrainResult:
    """Trains the meta-network in place under the selector."""
    return train(
        net,
        samples,
        Finetune(selector),
        config,
        out,
        device=device,
        resume=resume,
        label="finetune",
        provenance={"finetune": selector.mode, "space": dataclasses.asdict(net.space), **(provenance or {})},
    )
