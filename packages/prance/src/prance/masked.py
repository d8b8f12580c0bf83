"""The masked path: full width, masks after every product; for batches whose decisions differ, with gradients.

It equals the sliced path: norms average over an image's own channels, dead tokens have no attention and no rank.
"""

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.drop import drop_path
from torch import Tensor, nn

from prance.decision import Decision
from prance.engine import Attended
from prance.sliced import (
    attention_scores,
    embedded,
    padded_state,
    pooled,
    queries_keys_values,
    reduced,
    size_bias,
)
from prance.supernet import Block, MetaViT
from prance.tokens import Mean, TokenBatch


def channel_mask(width: Tensor, channels: int, like: Tensor) -> Tensor:
    """[batch, 1, channels]: 1 in the first `width` channels of every image."""
    mask = torch.arange(channels, device=like.device) < width.to(like.device)[:, None]
    return mask[:, None].to(like.dtype)


def masked_norm(norm: nn.LayerNorm, x: Tensor, mask: Tensor) -> Tensor:
    """Layer norm over the channels where the mask is 1; `x` and the result are 0 elsewhere."""
    kind = torch.promote_types(x.dtype, torch.float32)
    wide, wide_mask = x.to(kind), mask.to(kind)
    width = wide_mask.sum(-1, keepdim=True)
    centred = (wide - wide.sum(-1, keepdim=True) / width) * wide_mask
    variance = centred.square().sum(-1, keepdim=True) / width
    return ((centred * (variance + norm.eps).rsqrt()) * norm.weight + norm.bias * wide_mask).to(x.dtype)


class Masked:
    """See the module. `flow` is a TokenBatch of super width; channels and slots that are not there are 0."""

    def __init__(self, net: MetaViT, mean: Mean) -> None:
        self.net = net
        self.mean: Mean = mean

    def begin(self, images: Tensor, decision: Decision) -> TokenBatch:
        x = embedded(self.net, images, self.net.space.width)
        mask = channel_mask(decision.embed[:, 0], x.shape[-1], x)
        x = x * mask
        return TokenBatch.start(x if self.net.norm_pre is None else masked_norm(self.net.norm_pre, x, mask))

    def attend(self, block: int, flow: TokenBatch, decision: Decision, scores: bool, state: bool) -> Any:
        weights = self.net.blocks[block]
        assert isinstance(weights, Block)
        x, alive = flow.x, flow.alive
        mask = channel_mask(decision.embed[:, block], x.shape[-1], x)
        normed = masked_norm(weights.norm1, x, mask)
        q, k, v = queries_keys_values(weights, normed, self.net.space.heads).permute(2, 0, 3, 1, 4)
        bias = size_bias(flow.size)  # minus infinity in dead slots, whose size is 0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=None if bias is None else bias.to(q.dtype))
        out = weights.proj(out.transpose(1, 2).flatten(2))
        if weights.scale1 is not None:
            out = out * weights.scale1
        live = alive[:, :, None].to(x.dtype)
        x = (x + drop_path(out, weights.drop_path, self.net.training)) * mask * live
        ranks = attention_scores(q, k, bias, self.net.prefix, alive) if scores else None
        keys = padded_state(k * live[:, None], self.net.tokens) if state else None
        return Attended(dataclasses.replace(flow, x=x), ranks, keys)

    def reduce(self, point: int, flow: TokenBatch, scores: Any, decision: Decision) -> TokenBatch:
        return reduced(flow, scores, decision, point, self.net, self.mean)

    def feed(self, block: int, flow: TokenBatch, decision: Decision) -> TokenBatch:
        weights = self.net.blocks[block]
        assert isinstance(weights, Block)
        x = flow.x
        inside = channel_mask(decision.embed[:, block], x.shape[-1], x)
        after = channel_mask(decision.output[:, block], x.shape[-1], x)
        hidden = F.gelu(weights.fc1(masked_norm(weights.norm2, x, inside)))
        y = weights.fc2(hidden * channel_mask(decision.hidden[:, block], hidden.shape[-1], hidden))
        if weights.scale2 is not None:
            y = y * weights.scale2
        kept = x if weights.residual is None else weights.residual(x)
        y = drop_path(y, weights.drop_path, self.net.training)
        return dataclasses.replace(flow, x=(kept + y) * after * flow.alive[:, :, None].to(x.dtype))

    def head(self, flow: TokenBatch, decision: Decision) -> Tensor:
        net, x = self.net, flow.x
        mask = channel_mask(decision.embed[:, -1], x.shape[-1], x)
        x = x if net.norm is None else masked_norm(net.norm, x, mask)
        x = pooled(net, x, None if flow.full else flow.alive)
        if net.fc_norm is not None:
            x = masked_norm(net.fc_norm, x[:, None], mask)[:, 0]
        return net.head(x)

    def count(self, flow: TokenBatch) -> Tensor:
        return flow.count

    def origin(self, flow: TokenBatch) -> Tensor:
        return flow.origin
