"""A peer for comparisons: a timm vision transformer with token merging in every block (ToMe, arXiv 2210.09461)."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from papercore.errors import InputError
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn


class ToMeViT(nn.Module):
    """Merges `removed` tokens in every block, between attention and MLP, by bipartite matching of the keys.

    Attention is proportional (log of the size is added to the logits), means are weighted by size. LayerScale is
    respected, attention is fused.

    Args:
        model: class token, no dropout.
        removed: tokens that every block removes, at most half of those that may go.
    """

    def __init__(self, model: VisionTransformer, removed: int) -> None:
        super().__init__()
        if not isinstance(model, VisionTransformer) or model.num_prefix_tokens != 1:
            raise InputError("model", found=type(model).__name__, expected="a VisionTransformer with one class token")
        if removed < 0:
            raise InputError("removed", found=removed, expected="at least 0")
        self.model, self.removed = model, removed

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Logits."""
        model = self.model
        x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
        size = None
        for block in model.blocks:
            x, size = merging_block(block, x, size, self.removed)
        return model.forward_head(model.norm(x))


def merging_block(
    block: nn.Module, x: Float[Tensor, "batch tokens width"], size: Float[Tensor, "batch tokens"] | None, removed: int
) -> tuple[Float[Tensor, "batch kept width"], Float[Tensor, "batch kept"] | None]:
    """One block of timm with merging in the middle."""
    attention: nn.Module = block.get_submodule("attn")
    normed = block.get_submodule("norm1")(x)
    qkv = attention.get_submodule("qkv")(normed)
    q, k, v = qkv.unflatten(-1, (3, int(attention.num_heads), -1)).permute(2, 0, 3, 1, 4)  # pyright: ignore
    q, k = attention.get_submodule("q_norm")(q), attention.get_submodule("k_norm")(k)
    bias = None if size is None else size.log()[:, None, None, :].to(q)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    y = attention.get_submodule("norm")(y.transpose(1, 2).flatten(2))
    x = x + block.get_submodule("ls1")(attention.get_submodule("proj")(y))
    x, size = merge_alternate(x, size, k.mean(1), removed)
    y = block.get_submodule("mlp")(block.get_submodule("norm2")(x))
    return x + block.get_submodule("ls2")(y), size


def merge_alternate(
    x: Float[Tensor, "batch tokens width"],
    size: Float[Tensor, "batch tokens"] | None,
    metric: Float[Tensor, "batch tokens features"],
    removed: int,
) -> tuple[Float[Tensor, "batch kept width"], Float[Tensor, "batch kept"] | None]:
    """What `bipartite_merge` computes, without maps, all images alike, as fast as reasonable.

    The order is that of ToMe: what is left of the even tokens, then the odd ones.
    """
    removed = min(removed, (x.shape[1] - 1) // 2)
    if removed <= 0:
        return x, size
    unit = metric / metric.norm(dim=-1, keepdim=True)
    similar = unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)
    similar[:, 0] = -torch.inf
    best, target = similar.max(-1)
    edges = best.argsort(dim=-1, descending=True)
    gone, left = edges[:, :removed], edges[:, removed:].sort(1).values
    if size is None:
        size = x.new_ones(x.shape[:2])
    weighted = torch.cat([x * size[:, :, None], size[:, :, None]], 2)
    even, odd = weighted[:, ::2], weighted[:, 1::2]
    channels = weighted.shape[2]
    taken = even.gather(1, gone[:, :, None].expand(-1, -1, channels))
    # a product with zeros and ones is faster than adding at scattered places
    slots = torch.arange(odd.shape[1], device=x.device)[:, None]
    belongs = (slots == target.gather(1, gone)[:, None, :]).to(x)
    odd = odd + belongs @ taken
    whole = torch.cat([even.gather(1, left[:, :, None].expand(-1, -1, channels)), odd], 1)
    size = whole[:, :, -1]
    return whole[:, :, :-1] / size[:, :, None], size
