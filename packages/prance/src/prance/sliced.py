"""The sliced path: matrices are cut to what the decision keeps (PRANCE, section on inference). All images alike."""

import dataclasses
import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from papercore.errors import InputError
from timm.layers.drop import drop_path
from torch import Tensor, nn

from prance.decision import Decision
from prance.engine import Attended
from prance.supernet import Block, MetaViT
from prance.tokens import Mean, TokenBatch, merge_tokens, prune_tokens, rank_tokens, reorder


def sliced_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """Layer norm over the channels that `x` has."""
    width = x.shape[-1]
    return F.layer_norm(x, (width,), norm.weight[:width], norm.bias[:width], norm.eps)


def sliced_linear(layer: nn.Linear, x: Tensor, width: int) -> Tensor:
    """To the first `width` outputs, from the inputs that `x` has."""
    return F.linear(x, layer.weight[:width, : x.shape[-1]], layer.bias[:width])


def queries_keys_values(
    block: Block, x: Float[Tensor, "*rows width"], heads: int
) -> Float[Tensor, "*rows three heads channels"]:
    """Of normalised tokens; queries and keys normalised too where the block does that."""
    _, attention, _ = block.qkv_weight.shape
    weight = block.qkv_weight.view(3 * attention, -1)[:, : x.shape[-1]]
    bias = None if block.qkv_bias is None else block.qkv_bias.view(-1)
    qkv = F.linear(x, weight, bias).unflatten(-1, (3, heads, attention // heads))
    if isinstance(block.q_norm, nn.Identity) and isinstance(block.k_norm, nn.Identity):
        return qkv
    q, k, v = qkv.unbind(-3)
    return torch.stack([block.q_norm(q).to(v), block.k_norm(k).to(v), v], -3)


def attention_scores(
    q: Float[Tensor, "batch heads queries channels"],
    k: Float[Tensor, "batch heads tokens channels"],
    bias: Float[Tensor, "batch one one tokens"] | None,
    prefix: int,
    alive: Tensor | None = None,
) -> Float[Tensor, "batch tokens"]:
    """Mean over heads of the attention that the class token pays; without one, of all live queries.

    In float32 at least, so that near ties are ranked alike by every path.
    """
    q = q[:, :, :1] if prefix else q
    kind = torch.promote_types(q.dtype, torch.float32)
    logits = (q.to(kind) @ k.to(kind).transpose(-1, -2)) * q.shape[-1] ** -0.5
    if bias is not None:
        logits = logits + bias.to(kind)
    attention = logits.softmax(-1).mean(1)
    if prefix or alive is None:
        return attention.mean(1)
    return (attention * alive[:, :, None]).sum(1) / alive.sum(1, keepdim=True)


def size_bias(size: Float[Tensor, "batch slots"]) -> Float[Tensor, "batch one one slots"] | None:
    """log(size) of the keys (proportional attention of ToMe); minus infinity for dead slots, None when all are 1."""
    if bool((size == 1).all()):
        return None
    return size.log()[:, None, None, :]


def fit_width(x: Tensor, width: int) -> Tensor:
    """Cuts the channels, or pads them with zeros."""
    return x[..., :width] if x.shape[-1] >= width else F.pad(x, (0, width - x.shape[-1]))


def padded_state(k: Float[Tensor, "batch heads tokens channels"], length: int) -> Float[Tensor, "batch length"]:
    """The selector's state: keys averaged over heads and channels, padded with zeros."""
    state = k.mean((1, 3)).to(torch.promote_types(k.dtype, torch.float32))
    return F.pad(state, (0, length - state.shape[1]))


def pooled(net: MetaViT, x: Float[Tensor, "batch tokens width"], alive: Tensor | None = None) -> Tensor:
    """The class token, or the mean of the patch tokens."""
    if net.pool == "token":
        return x[:, 0]
    patches = x[:, net.prefix :]
    if alive is None:
        return patches.mean(1)
    live = alive[:, net.prefix :, None].to(x)
    return (patches * live).sum(1) / live.sum(1)


def embedded(net: MetaViT, images: Tensor, width: int) -> Float[Tensor, "batch tokens width"]:
    """Patches, prefix tokens and positions in the first `width` channels; not yet normalised."""
    weight, bias = net.patch_embed.weight[:width], net.patch_embed.bias
    bias = None if bias is None else bias[:width]
    x = F.conv2d(images, weight, bias, stride=net.patch_size).flatten(2).transpose(1, 2)
    prefix = [token[..., :width] for token in (net.cls_token, net.reg_token) if token is not None]
    x = torch.cat([*(token.expand(len(x), -1, -1).to(x.dtype) for token in prefix), x], 1)
    return x + net.pos_embed[..., :width]


class Sliced:
    """See the module. `flow` is a TokenBatch without dead slots, whose channels are the current width."""

    def __init__(self, net: MetaViT, mean: Mean) -> None:
        self.net = net
        self.mean: Mean = mean

    def begin(self, images: Tensor, decision: Decision) -> TokenBatch:
        self.check(decision)
        x = embedded(self.net, images, int(decision.embed[0, 0]))
        return TokenBatch.start(x if self.net.norm_pre is None else self.norm(self.net.norm_pre, x, x.shape[-1]))

    def check(self, decision: Decision) -> None:
        if not decision.uniform:
            raise InputError("decisions", found="several", expected="one for all images", hint="path='packed'")

    def attend(self, block: int, flow: TokenBatch, decision: Decision, scores: bool, state: bool) -> Any:
        weights = self.net.blocks[block]
        assert isinstance(weights, Block)
        width = int(decision.embed[0, block])
        normed = self.norm(weights.norm1, flow.x, width)
        q, k, v = queries_keys_values(weights, normed, self.net.space.heads).permute(2, 0, 3, 1, 4)
        bias = size_bias(flow.size)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=None if bias is None else bias.to(q.dtype))
        out = sliced_linear(weights.proj, out.transpose(1, 2).flatten(2), width)
        if weights.scale1 is not None:
            out = out * weights.scale1[:width]
        x = fit_width(flow.x, width) + self.dropped(weights, out)
        ranks = attention_scores(q, k, bias, self.net.prefix) if scores else None
        return Attended(dataclasses.replace(flow, x=x), ranks, padded_state(k, self.net.tokens) if state else None)

    def norm(self, norm: nn.LayerNorm, x: Tensor, width: int) -> Tensor:
        return sliced_norm(norm, x)

    def dropped(self, weights: Block, x: Tensor) -> Tensor:
        return drop_path(x, weights.drop_path, self.net.training)

    def reduce(self, point: int, flow: TokenBatch, scores: Any, decision: Decision) -> TokenBatch:
        return reduced(flow, scores, decision, point, self.net, self.mean)

    def feed(self, block: int, flow: TokenBatch, decision: Decision) -> TokenBatch:
        weights = self.net.blocks[block]
        assert isinstance(weights, Block)
        out = self.output(block, decision)
        x = flow.x
        hidden = F.gelu(
            sliced_linear(weights.fc1, self.norm(weights.norm2, x, x.shape[-1]), int(decision.hidden[0, block]))
        )
        y = sliced_linear(weights.fc2, hidden, out)
        if weights.scale2 is not None:
            y = y * weights.scale2[:out]
        kept = fit_width(x, out) if weights.residual is None else sliced_linear(weights.residual, x, out)
        return dataclasses.replace(flow, x=kept + self.dropped(weights, y))

    def output(self, block: int, decision: Decision) -> int:
        """The width after this block."""
        return int(decision.output[0, block])

    def head(self, flow: TokenBatch, decision: Decision) -> Tensor:
        net = self.net
        x = flow.x if net.norm is None else self.norm(net.norm, flow.x, flow.x.shape[-1])
        x = pooled(net, x)
        if net.fc_norm is not None:
            x = self.norm(net.fc_norm, x, x.shape[-1])
        return sliced_linear(net.head, x, net.num_classes)

    def count(self, flow: TokenBatch) -> Tensor:
        return flow.count

    def origin(self, flow: TokenBatch) -> Tensor:
        return flow.origin


def reduced(flow: TokenBatch, scores: Tensor, decision: Decision, point: int, net: MetaViT, mean: Mean) -> TokenBatch:
    """Ranks, prunes and merges as the decision says."""
    flow = reorder(flow, rank_tokens(scores, flow.count, net.prefix))
    flow = prune_tokens(flow, decision.prune[:, point], net.prefix, net.least)
    return merge_tokens(flow, decision.merge[:, point], net.prefix, mean, net.least)


class ReferenceFast(Sliced):
    """Two faults of the published inference, for its weights only: layer norms are scaled by sqrt(E / S), and the
    attention of a block at a decision point still sees the width of the undecided configuration, cut only in its
    residual (its norm is scaled by the decided E nevertheless)."""

    def norm(self, norm: nn.LayerNorm, x: Tensor, width: int) -> Tensor:
        channels = x.shape[-1]
        scaled = F.layer_norm(x, (channels,), eps=norm.eps) * math.sqrt(width / self.net.space.width)
        return scaled * norm.weight[:channels] + norm.bias[:channels]

    def output(self, block: int, decision: Decision) -> int:
        if block + 1 in self.net.space.points:
            return int(self.configured.embed[0, block + 1])
        return super().output(block, decision)

    def begin(self, images: Tensor, decision: Decision) -> TokenBatch:
        self.configured = decision  # before any selector is asked
        return super().begin(images, decision)
