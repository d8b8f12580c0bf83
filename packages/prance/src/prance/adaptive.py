"""Inference: a network, a selector and a budget as one model."""

import dataclasses
from typing import Literal

import torch
from jaxtyping import Float, Int
from papercore.errors import InputError
from torch import Tensor, nn

from prance.budget import MeanController, capped, check_budget, parse_macs
from prance.codebook import Codebook
from prance.decision import Decision, Tokens, decode_action
from prance.executor import Outcome, Path, execute
from prance.macs import Geometry, active_parameters, macs
from prance.selector import Selector
from prance.supernet import MetaViT
from prance.tokens import Mean

EngineName = Literal["auto", "packed", "bucketed", "sliced", "masked"]


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What an adaptive model says, and what it cost."""

    logits: Float[Tensor, "batch classes"]
    decisions: Decision
    macs: Int[Tensor, " batch"]
    """canonical count of every image"""
    tokens: Int[Tensor, "batch points"]
    """left after every decision point"""
    assignment: Int[Tensor, "batch tokens"]
    """for every original token (prefix first) the final token that holds it, -1 when it was dropped"""
    parameters: Int[Tensor, " batch"]
    """active ones"""
    outcome: Outcome
    """with states and the assignments of every decision point"""

    @property
    def confidence(self) -> Float[Tensor, " batch"]:
        """Probability of the predicted class."""
        return self.logits.float().softmax(-1).amax(-1)


class AdaptiveViT(nn.Module):
    """A meta-network that decides for every image while it runs.

    Args:
        net: the meta-network.
        selector: decides; None runs `decision`.
        tokens: the token mode, which must be the selector's.
        budget: mean MACs ("2.2G"): told to a selector that is told its budget, else kept by shifting its actions
            (what an image gets then depends on the images before it).
        max: MACs that no image may exceed.
        codebook: replaces actions by the nearest of a few.
        engine: how the network is run: "sliced" one image after another; "auto" is packed.
        decision: for all images, when there is no selector.

    Raises:
        InputError: a selector for another network, mode or space, or a budget that cannot be met.
    """

    def __init__(
        self,
        net: MetaViT,
        selector: Selector | None = None,
        tokens: Tokens | None = None,
        *,
        budget: str | float | None = None,
        max: str | float | None = None,
        codebook: Codebook | None = None,
        engine: EngineName = "auto",
        mean: Mean = "mean",
        decision: Decision | None = None,
    ) -> None:
        super().__init__()
        if (selector is None) == (decision is None):
            raise InputError("selector", found="both or none", expected="a selector, or one decision for all images")
        self.net, self.selector, self.codebook, self.decision = net, selector, codebook, decision
        self.engine: EngineName = engine
        self.geometry = Geometry.of(net)
        self.mean: Mean = mean
        largest = Decision.largest(net.space)
        self.full = int(macs(self.geometry, largest))
        self.budget = None if budget is None else parse_macs(budget)
        self.cap = None if max is None else parse_macs(max)
        for value in (self.budget, self.cap):
            if value is not None:
                check_budget(value, largest, self.geometry)
        if selector is None:
            if budget is not None or max is not None:
                raise InputError("budget", found="one", expected="none without a selector")
            self.controller = None
            return
        wrong = {
            "length of the state": (selector.tokens, net.tokens),
            "token mode": (selector.mode, tokens or selector.mode),
            "widths": (selector.space.embed, net.space.embed),
            "MLP ratios": (selector.space.mlp_ratio, net.space.mlp_ratio),
            "blocks in a group": (selector.space.group, net.space.group),
        }
        for what, (found, expected) in wrong.items():
            if found != expected:
                raise InputError(f"selector's {what}", found=found, expected=f"{expected}, the network's")
        controlled = self.budget is not None and not selector.budget
        self.controller = MeanController(self.budget) if controlled and self.budget is not None else None

    @torch.no_grad()
    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Prediction:
        """Predicts; the network's mode must be evaluation for repeatable answers."""
        space = self.net.space
        policy, start = None, self.decision
        if self.selector is not None:
            policy, start = self.decide, Decision.largest(space)
        assert start is not None
        if self.engine == "sliced" and len(images) > 1:
            parts = [
                execute(self.net, image[None], start, path="sliced", mean=self.mean, policy=policy) for image in images
            ]
            outcome = joined(parts)
        else:
            path: Path = "packed" if self.engine == "auto" else self.engine
            outcome = execute(self.net, images, start, path=path, mean=self.mean, policy=policy)
        spent = macs(self.geometry, outcome.decision)
        if self.controller is not None and len(images):
            self.controller.observe(spent)
        return Prediction(
            outcome.logits,
            outcome.decision,
            spent,
            outcome.count,
            outcome.origin,
            active_parameters(self.geometry, outcome.decision),
            outcome,
        )

    def decide(self, point: int, state: Tensor, decision: Decision) -> Decision:
        """The policy that `execute` asks."""
        selector = self.selector
        assert selector is not None
        share = None if self.budget is None else self.budget / self.full
        action = selector.actor(selector.prepared(state, (share or 1.0) if selector.budget else None))
        if self.controller is not None:
            action = (action - self.controller.shift).clamp(0, 1)
        if self.codebook is not None:
            action = self.codebook(point, action)
        ratio, embed, prune, merge = decode_action(action, self.net.space, selector.mode)
        decision = decision.replaced(point, embed, ratio, prune, merge)
        return decision if self.cap is None else capped(decision, point, self.cap, self.geometry)


def joined(parts: list[Outcome]) -> Outcome:
    """Outcomes of single images as one."""
    first = parts[0].decision
    decision = Decision(
        first.space, *(torch.cat([p.decision.tensors()[i] for p in parts]) for i in range(len(first.tensors())))
    )
    points = range(len(parts[0].states))
    return Outcome(
        torch.cat([p.logits for p in parts]),
        decision,
        torch.cat([p.count for p in parts]),
        torch.cat([p.origin for p in parts]),
        tuple(torch.cat([p.states[i] for p in parts]) for i in points),
        tuple(torch.cat([p.assignments[i] for p in parts]) for i in points),
    )
