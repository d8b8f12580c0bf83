"""Running a meta-network under decisions: one loop, four ways to compute its steps, one answer.

sliced    only what is kept, all images alike; with gradients (training of random subnets)
masked    everything, then masks; any decisions; with gradients (training under a selector)
packed    only what is kept, any decisions: the live tokens of all images in one matrix, products by width, attention
          by image; inference
bucketed  only what is kept, any decisions: images alike in what is still to come run together, sliced; inference

A decision is taken between the attention of one group's last block and its MLP, because the keys of that attention are
the selector's state and the MLP already gives the next group's width.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float, Int
from papercore.errors import InputError
from torch import Tensor

from prance.bucketed import Bucketed
from prance.decision import Decision
from prance.engine import Engine
from prance.masked import Masked
from prance.packed import Packed
from prance.sliced import ReferenceFast, Sliced
from prance.supernet import MetaViT
from prance.tokens import Mean

Path = Literal["sliced", "masked", "packed", "bucketed", "reference_fast"]
Policy = Callable[[int, Float[Tensor, "batch tokens"], Decision], Decision]
"""(number of the decision point, state of every image, decisions so far) -> decisions with this point's group set"""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a network says about every image, and what that took."""

    logits: Float[Tensor, "batch classes"]
    decision: Decision
    count: Int[Tensor, "batch points"]
    """tokens after every decision point"""
    origin: Int[Tensor, "batch tokens"]
    """for every original token (class token first) the final token that holds it, -1 when it was dropped"""
    states: tuple[Float[Tensor, "batch tokens"], ...]
    """one for every decision point"""
    assignments: tuple[Int[Tensor, "batch tokens"], ...]
    """`origin` after every decision point"""


@dataclasses.dataclass(frozen=True)
class Run:
    """A pass through the network that can stop at every decision, be copied, and go on in several ways."""

    engine: Engine
    flow: object
    decision: Decision
    block: int = 0
    """the next block; its attention is done already when `fed` is false"""
    fed: bool = True
    scores: object = None
    counts: tuple[Int[Tensor, " batch"], ...] = ()
    origins: tuple[Int[Tensor, "batch tokens"], ...] = ()

    @classmethod
    def start(cls, engine: Engine, images: Tensor, decision: Decision) -> "Run":
        return cls(engine, engine.begin(images, decision), decision)

    def attended(self) -> tuple["Run", Tensor | None]:
        """Runs up to the attention of the block before the next decision point and gives the state there; None when
        no decision point is left (nothing has been run then)."""
        space = self.engine.net.space
        after = [point for point in space.points if point > self.block + (not self.fed)]
        if not after:
            return self, None
        run = self._until(after[0] - 1)
        attended = self.engine.attend(run.block, run.flow, run.decision, run.block in space.points, True)
        run = dataclasses.replace(run, flow=attended.flow, scores=attended.scores, fed=False)
        return run, attended.state

    def decided(self, decision: Decision) -> "Run":
        """Goes on under another decision (for blocks not yet reached)."""
        return dataclasses.replace(self, decision=decision)

    def finish(self) -> Float[Tensor, "batch classes"]:
        """Runs to the end."""
        run = self._until(self.engine.net.space.depth)
        return self.engine.head(run.flow, run.decision)

    def _until(self, block: int) -> "Run":
        """Runs all blocks before `block`."""
        run, space = self, self.engine.net.space
        while run.block < block:
            i, flow, scores = run.block, run.flow, run.scores
            if run.fed:
                attended = run.engine.attend(i, flow, run.decision, i in space.points, False)
                flow, scores = attended.flow, attended.scores
            counts, origins = run.counts, run.origins
            if i in space.points:
                flow = run.engine.reduce(space.points.index(i), flow, scores, run.decision)
                counts, origins = (*counts, run.engine.count(flow)), (*origins, run.engine.origin(flow))
            flow = run.engine.feed(i, flow, run.decision)
            run = Run(run.engine, flow, run.decision, i + 1, True, None, counts, origins)
        return run


def make_engine(net: MetaViT, path: Path, mean: Mean = "mean") -> Engine:
    """Raises InputError for an unknown path."""
    engines: dict[str, Callable[[MetaViT, Mean], Engine]] = {
        "sliced": Sliced,
        "masked": Masked,
        "packed": Packed,
        "bucketed": Bucketed,
        "reference_fast": ReferenceFast,
    }
    if path not in engines:
        raise InputError("path", found=path, expected=", ".join(engines))
    return engines[path](net, mean)


def execute(
    net: MetaViT,
    images: Float[Tensor, "batch channels height width"],
    decision: Decision,
    *,
    path: Path,
    mean: Mean = "mean",
    policy: Policy | None = None,
) -> Outcome:
    """Runs the network, asking the policy at every decision point if there is one.

    Raises:
        InputError: images or decisions that do not fit; "sliced" with decisions that differ.
    """
    net.check_images(images)
    decision = decision.expand(len(images))
    space = net.space
    if len(images) == 0:
        none = torch.zeros(0, net.tokens, dtype=torch.long)
        points = len(space.points)
        return Outcome(
            images.new_zeros(0, net.num_classes),
            decision,
            torch.zeros(0, points, dtype=torch.long),
            none,
            (images.new_zeros(0, net.tokens),) * points,
            (none,) * points,
        )
    run = Run.start(make_engine(net, path, mean), images, decision)
    states = []
    while True:
        run, state = run.attended()
        if state is None:
            break
        states.append(state)
        if policy is not None:
            run = run.decided(policy(len(states) - 1, state.detach(), run.decision))
    run = run._until(space.depth)
    counts = torch.stack(run.counts, 1) if run.counts else torch.zeros(len(images), 0, dtype=torch.long)
    logits = run.engine.head(run.flow, run.decision)
    return Outcome(logits, run.decision, counts, run.engine.origin(run.flow), tuple(states), run.origins)
