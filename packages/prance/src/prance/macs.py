"""Multiply-accumulates and active parameters of subnets, in closed form (the "FLOPs" of this literature)."""

import dataclasses
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from prance.decision import Decision, keep_count
from prance.supernet import MetaViT

Count = Literal["canonical", "reference"]


@dataclasses.dataclass(frozen=True)
class Geometry:
    """What the counts depend on beside the decision."""

    tokens: int = 197
    """before any reduction, prefix included"""
    prefix: int = 1
    patch: int = 16
    """pixels"""
    channels: int = 3
    classes: int = 1000
    projected: tuple[int, ...] = (2, 5, 8)
    """blocks with a residual projection"""
    least: int = 1
    """tokens that no reduction goes below"""

    @classmethod
    def of(cls, net: MetaViT) -> "Geometry":
        projected = tuple(i for i, block in enumerate(net.blocks) if block.residual is not None)
        return cls(net.tokens, net.prefix, net.patch_size, net.channels, net.num_classes, projected, net.least)


def token_counts(
    decision: Decision, geometry: Geometry
) -> tuple[Int[Tensor, "batch depth"], Int[Tensor, "batch depth"]]:
    """Tokens in the attention and in the MLP of every block."""
    space = decision.space
    n = torch.full((len(decision),), geometry.tokens)
    attention, mlp = [], []
    for block in range(space.depth):
        attention.append(n)
        if block in space.points:
            point = space.points.index(block)
            n = keep_count(decision.prune[:, point], n, geometry.least)
            n = keep_count(decision.merge[:, point], n, geometry.least)
        mlp.append(n)
    return torch.stack(attention, 1), torch.stack(mlp, 1)


def macs(
    net: MetaViT | Geometry,
    decision: Decision,
    count: Count = "canonical",
    tokens: tuple[Int[Tensor, "batch depth"], Int[Tensor, "batch depth"]] | None = None,
) -> Int[Tensor, " batch"]:
    """Multiply-accumulates of every image.

    canonical: patch embedding, products of attention and MLP, residual projections, head on the class token.
    reference: as the published code counts: layer norms and position are added, the head is counted for every token
    that is left, residual projections are not counted.

    Similarities of merging and the selector are not counted, see `merge_macs`.

    Args:
        tokens: in the attention and in the MLP of every block, if not as `token_counts` says (the published code
            counts the attention of a block that prunes and merges on the pruned tokens, although it runs before).
    """
    shape = net if isinstance(net, Geometry) else Geometry.of(net)
    d = decision.space.attention
    n, m = token_counts(decision, shape) if tokens is None else tokens
    e, f, out = decision.embed, decision.hidden, decision.output
    patches = shape.tokens - shape.prefix
    first, last = e[:, 0], e[:, -1]
    total = patches * shape.channels * shape.patch**2 * first
    total = total + (n * e * 3 * d + 2 * n * n * d + n * d * e + m * (e * f + f * out)).sum(1)
    if count == "canonical":
        for block in shape.projected:
            total = total + m[:, block] * e[:, block] * out[:, block]
        return total + last * shape.classes
    total = total + (n * e + m * e).sum(1) + first + shape.tokens * first // 2
    return total + m[:, -1] * last * shape.classes


def merge_macs(net: MetaViT | Geometry, decision: Decision) -> Int[Tensor, " batch"]:
    """Of the similarities: (n - k) k E at every merge of n tokens into k."""
    shape = net if isinstance(net, Geometry) else Geometry.of(net)
    space, least = decision.space, shape.least
    n = torch.full((len(decision),), shape.tokens)
    total = torch.zeros(len(decision), dtype=torch.long)
    for point, block in enumerate(space.points):
        pruned = keep_count(decision.prune[:, point], n, least)
        n = keep_count(decision.merge[:, point], pruned, least)
        total += (pruned - n) * n * decision.embed[:, block]
    return total


def active_parameters(net: MetaViT | Geometry, decision: Decision) -> Int[Tensor, " batch"]:
    """Weights that a decision uses: cut embeddings, blocks, residual projections, norms and head."""
    shape = net if isinstance(net, Geometry) else Geometry.of(net)
    d = decision.space.attention
    e, f, out = decision.embed, decision.hidden, decision.output
    first, last = e[:, 0], e[:, -1]
    total = first * (shape.channels * shape.patch**2 + 1 + shape.prefix + shape.tokens)
    total = total + (3 * d * (e + 1) + d * e + e + 4 * e + e * f + f + f * out + out).sum(1)
    for block in shape.projected:
        total = total + (e[:, block] + 1) * out[:, block]
    return total + 2 * last + (last + 1) * shape.classes
