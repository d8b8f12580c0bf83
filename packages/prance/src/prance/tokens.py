"""Reducing tokens: pruning, merging, prune-then-merge (PRANCE), bipartite merging (ToMe), fusing (EViT).

Every function takes a batch whose images may have different numbers of live tokens: an image's tokens are the first
`count` of its row, the rest of the row is dead and stays zero. Prefix tokens (class token, registers) come first, are
never dropped, and take nothing up unless nothing else is left. `origin` says for every original token in which token
of the row it is now; -1 means dropped.
"""

import dataclasses
from typing import Literal

import torch
from jaxtyping import Float, Int
from papercore.errors import InputError
from torch import Tensor

from prance.decision import keep_count

Mean = Literal["mean", "size_mean"]


@dataclasses.dataclass(frozen=True)
class TokenBatch:
    """Tokens of several images."""

    x: Float[Tensor, "batch slots channels"]
    size: Float[Tensor, "batch slots"]
    """how many original patches a token stands for; 0 in dead slots"""
    count: Int[Tensor, " batch"]
    """live tokens, on the CPU"""
    origin: Int[Tensor, "batch original"]
    """for every original token the slot that holds it, -1 when it was dropped"""

    @property
    def alive(self) -> Tensor:
        """[batch, slots], on the device of the tokens."""
        slots = torch.arange(self.x.shape[1], device=self.x.device)
        return slots < self.count.to(self.x.device)[:, None]

    @property
    def full(self) -> bool:
        """Whether no slot is dead."""
        return bool((self.count == self.x.shape[1]).all())

    @classmethod
    def start(cls, x: Float[Tensor, "batch tokens channels"]) -> "TokenBatch":
        """All tokens live, each standing for itself."""
        batch, tokens, _ = x.shape
        origin = torch.arange(tokens, device=x.device).expand(batch, -1)
        size = torch.ones(batch, tokens, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        return cls(x, size, torch.full((batch,), tokens), origin)

    def trimmed(self) -> "TokenBatch":
        """Without the slots that are dead in every image."""
        slots = int(self.count.max()) if len(self.count) else self.x.shape[1]
        return dataclasses.replace(self, x=self.x[:, :slots], size=self.size[:, :slots])


def rank_tokens(
    scores: Float[Tensor, "batch slots"], count: Int[Tensor, " batch"], prefix: int = 1
) -> Int[Tensor, "batch slots"]:
    """Slots in the order in which they are kept: prefix tokens, then live tokens by falling score, then dead ones.

    Equal scores keep the order of the slots.
    """
    slots = torch.arange(scores.shape[1], device=scores.device)
    key = scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
    key = key.masked_fill(slots >= count.to(scores.device)[:, None], -torch.inf)
    key = key.masked_fill(slots < prefix, torch.inf)
    return key.sort(dim=1, descending=True, stable=True).indices


def reorder(tokens: TokenBatch, order: Int[Tensor, "batch slots"]) -> TokenBatch:
    """The same tokens in another order."""
    x = tokens.x.gather(1, order[:, :, None].expand_as(tokens.x))
    where = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    return TokenBatch(x, tokens.size.gather(1, order), tokens.count, follow(tokens.origin, where))


def follow(origin: Int[Tensor, "batch original"], where: Int[Tensor, "batch slots"]) -> Int[Tensor, "batch original"]:
    """`origin` after the tokens of slot j have moved to slot where[j] (-1: dropped)."""
    moved = where.gather(1, origin.clamp(min=0))
    return torch.where(origin < 0, origin, moved)


def prune_tokens(
    tokens: TokenBatch, ratio: Float[Tensor, " batch"], prefix: int = 1, least: int | None = None
) -> TokenBatch:
    """Keeps the first max(least, floor(p n)) tokens of each image; they must be in the order of `rank_tokens`.

    Args:
        least: None: the prefix tokens, or one.
    """
    kept = keep_count(ratio, tokens.count, max(1, prefix) if least is None else least)
    return _first(tokens, kept)


def _first(tokens: TokenBatch, kept: Int[Tensor, " batch"]) -> TokenBatch:
    slots = torch.arange(tokens.x.shape[1], device=tokens.x.device)
    alive = slots < kept.to(slots.device)[:, None]
    where = torch.where(alive, slots.expand_as(alive), -1)
    x = tokens.x.masked_fill(~alive[:, :, None], 0)
    size = tokens.size.masked_fill(~alive, 0)
    return TokenBatch(x, size, kept, follow(tokens.origin, where)).trimmed()


def merge_tokens(
    tokens: TokenBatch,
    ratio: Float[Tensor, " batch"],
    prefix: int = 1,
    mean: Mean = "mean",
    least: int | None = None,
) -> TokenBatch:
    """Merges each image's last tokens into its first max(least, floor(m n)), each into the most similar by cosine.

    The tokens must be in the order of `rank_tokens`. Prefix tokens are no targets unless they are all that is left;
    equal cosines go to the lower slot. The target becomes the mean of itself and what it takes up ("mean", as PRANCE
    and DiffRate do) or the mean weighted by size ("size_mean", as ToMe does); sizes add up.
    """
    if mean not in ("mean", "size_mean"):
        raise InputError("reduce", found=mean, expected="mean or size_mean")
    kept = keep_count(ratio, tokens.count, max(1, prefix) if least is None else least)
    if bool((kept == tokens.count).all()):
        return tokens
    x, device = tokens.x, tokens.x.device
    slots = torch.arange(x.shape[1], device=device)
    k, n = kept.to(device)[:, None], tokens.count.to(device)[:, None]
    first_target = torch.where(k > prefix, prefix, (k - 1).clamp(min=0))
    sources = (slots >= k) & (slots < n)
    with torch.no_grad():
        precise = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        unit = precise / precise.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(precise.dtype).tiny)
        most = int(kept.max())
        similar = unit @ unit[:, :most].transpose(1, 2)
        targets = (slots[:most] >= first_target) & (slots[:most] < k)
        target = similar.masked_fill(~targets[:, None, :], -torch.inf).argmax(-1)
        where = torch.where(sources, target, slots.expand_as(target))
    return _collect(tokens, where, sources, kept, mean)


def _collect(tokens: TokenBatch, where: Tensor, sources: Tensor, kept: Tensor, mean: Mean) -> TokenBatch:
    """Adds the sources to slots `where`, takes means, and keeps the first `kept` slots."""
    x = tokens.x
    weight = torch.ones_like(tokens.size) if mean == "mean" else tokens.size
    total = torch.zeros_like(x).scatter_add(1, where[:, :, None].expand_as(x), x * weight[:, :, None].to(x.dtype))
    parts = torch.zeros_like(weight).scatter_add(1, where, weight)
    taken = torch.zeros_like(tokens.size).scatter_add(1, where, sources.to(tokens.size))
    merged = torch.where(taken[:, :, None] > 0, (total / parts.clamp(min=1e-30)[:, :, None]).to(x.dtype), x)
    size = torch.zeros_like(tokens.size).scatter_add(1, where, tokens.size)
    return _first(TokenBatch(merged, size, tokens.count, follow(tokens.origin, where)), kept)


def bipartite_merge(
    tokens: TokenBatch, removed: int, metric: Float[Tensor, "batch slots features"] | None = None, prefix: int = 1
) -> TokenBatch:
    """ToMe (arXiv 2210.09461, section 3): alternate tokens are split in two sets; the `removed` best edges from the
    first set to the second are contracted, as means weighted by size. All images must have the same number of tokens.

    The order is that of ToMe: what is left of the first set, then the second set.

    Args:
        removed: tokens to remove, at most half of those that may go.
        metric: what similarity is computed on; None: the tokens themselves.
    """
    if not tokens.full:
        raise InputError("tokens", found="images with different numbers of tokens", expected="the same number")
    x, (batch, n, _) = tokens.x, tokens.x.shape
    removed = min(removed, (n - prefix) // 2)
    if removed <= 0:
        return tokens
    with torch.no_grad():
        metric = x if metric is None else metric
        unit = metric / metric.norm(dim=-1, keepdim=True)
        even, odd = unit[:, ::2], unit[:, 1::2]
        similar = even @ odd.transpose(1, 2)
        if prefix:
            similar[:, : (prefix + 1) // 2] = -torch.inf
            similar[:, :, : prefix // 2] = -torch.inf
        best, target = similar.max(-1)
        edges = best.argsort(dim=-1, descending=True)
        gone, left = edges[:, :removed], edges[:, removed:].sort(1).values
        # slots of the result: what is left of the even tokens, then the odd ones
        where = torch.empty(batch, n, dtype=torch.long, device=x.device)
        stay = left.shape[1]
        where.scatter_(1, 2 * left, torch.arange(stay, device=x.device).expand(batch, -1))
        where[:, 1::2] = stay + torch.arange(odd.shape[1], device=x.device)
        where.scatter_(1, 2 * gone, stay + target.gather(1, gone))
    weight = tokens.size
    size = torch.zeros_like(weight).scatter_add(1, where, weight)
    total = torch.zeros_like(x).scatter_add(1, where[:, :, None].expand_as(x), x * weight[:, :, None].to(x.dtype))
    merged = (total / size.clamp(min=1e-30)[:, :, None]).to(x.dtype)
    kept = torch.full_like(tokens.count, n - removed)
    return _first(TokenBatch(merged, size, tokens.count, follow(tokens.origin, where)), kept)


def fuse_tokens(
    tokens: TokenBatch, ratio: Float[Tensor, " batch"], scores: Float[Tensor, "batch slots"], prefix: int = 1
) -> TokenBatch:
    """EViT (arXiv 2202.07800, section 3.2): as `prune_tokens`, and one more token, the mean of the dropped ones
    weighted by their scores. An image that drops nothing gets none.

    Args:
        scores: of the tokens in their present order, that of `rank_tokens`.
    """
    kept = keep_count(ratio, tokens.count, max(1, prefix))
    slots = torch.arange(tokens.x.shape[1], device=tokens.x.device)
    k, n = kept.to(slots.device)[:, None], tokens.count.to(slots.device)[:, None]
    dropped = (slots >= k) & (slots < n)
    weight = (scores * dropped).to(tokens.x)
    fused = (tokens.x * weight[:, :, None]).sum(1) / weight.sum(1).clamp(min=1e-30)[:, None]
    any_dropped = dropped.any(1)
    where = torch.where(dropped, k.expand_as(dropped), slots.expand_as(dropped))
    last = (slots == k) & any_dropped[:, None]
    x = torch.where(last[:, :, None], fused[:, None], tokens.x)
    size = torch.zeros_like(tokens.size).scatter_add(1, where, tokens.size)
    moved = TokenBatch(x, size, tokens.count, follow(tokens.origin, where))
    return _first(moved, kept + any_dropped.cpu().long())
