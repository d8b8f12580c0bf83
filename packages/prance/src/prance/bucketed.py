"""The bucketed path: images alike in what is still to come run together, each bucket sliced. Inference."""

import dataclasses

import torch
from torch import Tensor

from prance.decision import Decision
from prance.engine import Attended
from prance.sliced import Sliced
from prance.supernet import MetaViT
from prance.tokens import Mean, TokenBatch


@dataclasses.dataclass(frozen=True)
class Bucket:
    """Images with the same number of tokens and, up to the next decision, the same widths."""

    images: Tensor
    """their numbers in the batch"""
    flow: TokenBatch


class Bucketed:
    """See the module. `flow` is a list of buckets; scores are a list in the same order."""

    def __init__(self, net: MetaViT, mean: Mean) -> None:
        self.net, self.sliced = net, Sliced(net, mean)

    def begin(self, images: Tensor, decision: Decision) -> list[Bucket]:
        buckets = []
        for rows in _alike(decision.embed[:, :1]):
            buckets.append(Bucket(rows, self.sliced.begin(images[rows.to(images.device)], _first(decision, rows))))
        return buckets

    def attend(self, block: int, flow: list[Bucket], decision: Decision, scores: bool, state: bool) -> Attended:
        key = decision.embed[:, block : block + 1]
        buckets, ranks = [], []
        states = None
        for bucket in self.split(flow, key):
            done = self.sliced.attend(block, bucket.flow, _first(decision, bucket.images), scores, state)
            buckets.append(Bucket(bucket.images, done.flow))
            ranks.append(done.scores)
            if done.state is not None:
                if states is None:
                    states = done.state.new_zeros(len(decision), self.net.tokens)
                states[bucket.images.to(states.device)] = done.state
        return Attended(buckets, ranks if scores else None, states)

    def reduce(self, point: int, flow: list[Bucket], scores: list[Tensor], decision: Decision) -> list[Bucket]:
        buckets = []
        for bucket, rank in zip(flow, scores, strict=True):
            whole = self.sliced.reduce(point, bucket.flow, rank, decision[bucket.images])
            for rows in _alike(whole.count[:, None]):
                buckets.append(Bucket(bucket.images[rows], _select(whole, rows).trimmed()))
        return buckets

    def feed(self, block: int, flow: list[Bucket], decision: Decision) -> list[Bucket]:
        key = torch.stack([decision.embed[:, block], decision.hidden[:, block], decision.output[:, block]], 1)
        return [
            Bucket(bucket.images, self.sliced.feed(block, bucket.flow, _first(decision, bucket.images)))
            for bucket in self.split(flow, key)
        ]

    def head(self, flow: list[Bucket], decision: Decision) -> Tensor:
        parts = [self.sliced.head(bucket.flow, decision) for bucket in flow]
        logits = torch.empty_like(parts[0]).new_empty(len(decision), self.net.num_classes)
        for bucket, part in zip(flow, parts, strict=True):
            logits[bucket.images.to(part.device)] = part
        return logits

    def count(self, flow: list[Bucket]) -> Tensor:
        return self._gathered([(bucket.images, bucket.flow.count) for bucket in flow])

    def origin(self, flow: list[Bucket]) -> Tensor:
        return self._gathered([(bucket.images, bucket.flow.origin) for bucket in flow])

    def _gathered(self, parts: list[tuple[Tensor, Tensor]]) -> Tensor:
        total = sum(len(images) for images, _ in parts)
        whole = parts[0][1].new_empty(total, *parts[0][1].shape[1:])
        for images, part in parts:
            whole[images.to(whole.device)] = part
        return whole

    def split(self, flow: list[Bucket], key: Tensor) -> list[Bucket]:
        """Buckets whose images share the key's row too; buckets that are alike afterwards run as one."""
        pieces: dict[tuple[int, ...], list[Bucket]] = {}
        for bucket in flow:
            for rows in _alike(key[bucket.images]):
                images = bucket.images[rows]
                whole = len(rows) == len(bucket.images)
                piece = Bucket(images, bucket.flow if whole else _select(bucket.flow, rows))
                shape = (piece.flow.x.shape[1], piece.flow.x.shape[2], *key[images[0]].tolist())
                pieces.setdefault(shape, []).append(piece)
        return [_joined(alike) for alike in pieces.values()]


def _alike(key: Tensor) -> list[Tensor]:
    """Row numbers, grouped by equal rows."""
    _, group = key.unique(dim=0, return_inverse=True)
    return [(group == number).nonzero().flatten() for number in range(int(group.max()) + 1)]


def _first(decision: Decision, images: Tensor) -> Decision:
    """What the sliced path needs to know of images that are alike in this block."""
    return decision[images[:1]]


def _select(flow: TokenBatch, rows: Tensor) -> TokenBatch:
    there = rows.to(flow.x.device)
    return TokenBatch(flow.x[there], flow.size[there], flow.count[rows], flow.origin[there])


def _joined(buckets: list[Bucket]) -> Bucket:
    if len(buckets) == 1:
        return buckets[0]
    flows = [bucket.flow for bucket in buckets]
    names = ("x", "size", "count", "origin")
    joined = TokenBatch(*(torch.cat([getattr(flow, name) for flow in flows]) for name in names))
    return Bucket(torch.cat([bucket.images for bucket in buckets]), joined)
