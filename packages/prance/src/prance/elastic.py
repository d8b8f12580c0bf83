"""A meta-network around any timm VisionTransformer, channels sorted by importance, other image sizes."""

import copy
import dataclasses
import math
from typing import Any

import timm
import torch
from papercore.errors import InputError
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from prance.space import SearchSpace
from prance.supernet import Block, MetaViT


def elastic(
    model: VisionTransformer | str,
    space: SearchSpace | None = None,
    *,
    sort: bool = True,
    residual_projection: bool = False,
    pretrained: bool = False,
) -> MetaViT:
    """A meta-network whose super weights are the model's; at the largest choice its logits are the model's.

    Args:
        model: a timm vision transformer (class token or average pooling, registers, LayerScale, normalised queries and
            keys), or its name.
        space: the choices, of which the largest must be the model's own width and MLP ratio; heads and their size are
            taken from the model. None: five widths from 60 % of the model's and half, three quarters and all of its
            MLP ratio, groups of a quarter of the depth.
        sort: order the channels of the residual stream and the hidden channels of every MLP by importance (sums of
            absolute weights), so that prefixes keep the important ones; the function is the same.
        residual_projection: add the published residual projections, at the identity.
        pretrained: load the weights of a model given by name; this downloads them.

    Raises:
        InputError: not such a model, a part of it that is not supported, or choices that do not fit.
    """
    if isinstance(model, str):
        if not timm.is_model(model):
            raise InputError("model", found=model, expected="the name of a model of timm")
        made: Any = timm.create_model(model, pretrained=pretrained)
        model = made
    if not isinstance(model, VisionTransformer):
        raise InputError("model", found=type(model).__name__, expected="timm's VisionTransformer")
    blocks: list[Any] = list(model.blocks)
    attention, width = blocks[0].attn, model.embed_dim
    hidden = blocks[0].mlp.fc1.out_features
    _check(model)
    if space is None:
        widths = sorted({max(8, int(width * share) // 8 * 8) for share in (0.6, 0.7, 0.8, 0.9)} | {width})
        ratios = tuple(share * hidden / width for share in (0.5, 0.75, 1.0))
        space = SearchSpace(
            tuple(widths),
            ratios,
            group=_quarter(len(blocks)),
            depth=len(blocks),
            heads=attention.num_heads,
            head_dim=attention.head_dim,
        )
    if space.depth != len(blocks):
        raise InputError("field depth", found=space.depth, expected=f"{len(blocks)}, the model's")
    if space.embed[-1] != width or math.floor(width * space.mlp_ratio[-1]) != hidden:
        raise InputError(
            "largest choices",
            found=f"{space.embed[-1]}, {space.mlp_ratio[-1]:g}",
            expected=f"width {width}, MLP ratio {hidden / width:g}",
        )
    space = dataclasses.replace(
        space,
        heads=attention.num_heads,
        head_dim=attention.head_dim,
        super_embed=width,
        super_ratio=space.mlp_ratio[-1],
    )
    size, patch = model.patch_embed.img_size, model.patch_embed.patch_size
    assert size is not None
    classes = model.head.out_features if isinstance(model.head, nn.Linear) else 0
    net = MetaViT(
        space,
        classes,
        image_size=size[0],
        patch_size=patch[0],
        channels=model.patch_embed.proj.in_channels,
        class_token=model.cls_token is not None,
        registers=0 if model.reg_token is None else model.reg_token.shape[1],
        pool="token" if model.global_pool == "token" else "avg",
        layer_scale=isinstance(getattr(blocks[0].ls1, "gamma", None), Tensor),
        qkv_bias=attention.qkv.bias is not None,
        residual_projection=residual_projection,
    )
    with torch.no_grad():
        _copy(model, net)
    if sort:
        sort_channels(net)
    return net.to(model.patch_embed.proj.weight).train(model.training)


def _quarter(depth: int) -> int:
    """The divisor of the depth that is nearest to a quarter of it."""
    return min((d for d in range(1, depth + 1) if depth % d == 0), key=lambda d: (abs(d - depth / 4), d))


def _check(model: VisionTransformer) -> None:
    """Raises InputError for parts that a meta-network does not have."""
    size, patch = model.patch_embed.img_size, model.patch_embed.patch_size
    first: Any = model.blocks[0]
    drops = [m for m in model.modules() if isinstance(m, nn.Dropout) and m.p > 0]
    reasons = {
        "an image that is not square": size is None or size[0] != size[1] or patch[0] != patch[1],
        "attention pooling": model.attn_pool is not None,
        f"pooling {model.global_pool!r}": model.global_pool not in ("token", "avg"),
        "pooling that includes prefix tokens": bool(getattr(model, "pool_include_prefix", False)),
        "no classifier": not isinstance(model.head, nn.Linear),
        "dropout": bool(drops),
        "a block of another kind": type(first).__name__ != "Block" or type(first.mlp).__name__ != "Mlp",
        "an activation other than GELU": not isinstance(getattr(first.mlp, "act", None), nn.GELU)
        or getattr(first.mlp.act, "approximate", "none") != "none",
        "gated or normalised attention": getattr(first.attn, "gate", None) is not None
        or not isinstance(getattr(first.attn, "norm", nn.Identity()), nn.Identity),
        "a normalised MLP": not isinstance(getattr(first.mlp, "norm", nn.Identity()), nn.Identity),
        "norms other than layer norm": not isinstance(first.norm1, nn.LayerNorm),
        "a norm after the patch embedding": not isinstance(model.patch_embed.norm, nn.Identity),
    }
    for reason, present in reasons.items():
        if present:
            raise InputError("model", found=reason, expected="a plain vision transformer with a linear classifier")


def _copy(model: VisionTransformer, net: MetaViT) -> None:
    """All weights, into their places."""

    def norm(source: nn.Module) -> nn.LayerNorm | None:
        if not isinstance(source, nn.LayerNorm):
            return None
        made = nn.LayerNorm(source.normalized_shape[0], source.eps)
        assert source.weight is not None
        made.weight.copy_(source.weight)
        if source.bias is not None:
            made.bias.copy_(source.bias)
        return made

    def linear(target: nn.Linear | nn.Conv2d, source: nn.Module) -> None:
        assert isinstance(source, nn.Linear | nn.Conv2d)
        target.weight.copy_(source.weight)
        assert target.bias is not None
        if source.bias is None:
            target.bias.zero_()
        else:
            target.bias.copy_(source.bias)

    linear(net.patch_embed, model.patch_embed.proj)
    if net.cls_token is not None and model.cls_token is not None:
        net.cls_token.copy_(model.cls_token)
    if net.reg_token is not None and model.reg_token is not None:
        net.reg_token.copy_(model.reg_token)
    net.pos_embed.zero_()
    if model.pos_embed is not None:
        net.pos_embed[:, -model.pos_embed.shape[1] :].copy_(model.pos_embed)
    net.norm_pre, net.norm, net.fc_norm = norm(model.norm_pre), norm(model.norm), norm(model.fc_norm)
    sources: list[Any] = list(model.blocks)
    for block, source in zip(net.blocks, sources, strict=True):
        assert isinstance(block, Block)
        for name in ("norm1", "norm2"):
            made = norm(getattr(source, name))
            assert made is not None
            setattr(block, name, made)
        block.qkv_weight.copy_(source.attn.qkv.weight.view_as(block.qkv_weight))
        if block.qkv_bias is not None:
            block.qkv_bias.copy_(source.attn.qkv.bias.view_as(block.qkv_bias))
        block.q_norm, block.k_norm = copy.deepcopy(source.attn.q_norm), copy.deepcopy(source.attn.k_norm)
        linear(block.proj, source.attn.proj)
        linear(block.fc1, source.mlp.fc1)
        linear(block.fc2, source.mlp.fc2)
        if block.scale1 is not None and block.scale2 is not None:
            block.scale1.copy_(source.ls1.gamma)
            block.scale2.copy_(source.ls2.gamma)
        if block.residual is not None:
            nn.init.eye_(block.residual.weight)
            nn.init.zeros_(block.residual.bias)
        block.drop_path = float(getattr(source.drop_path1, "drop_prob", 0.0) or 0.0)
    linear(net.head, model.head)


@torch.no_grad()
def sort_channels(net: MetaViT) -> None:
    """Orders channels by falling importance, in place; the function at the largest choice does not change.

    A channel of the residual stream counts the absolute weights that write and read it in all blocks; a hidden channel
    of an MLP those of its own two products (the criterion of once-for-all networks, arXiv 1908.09791).
    """
    blocks = [block for block in net.blocks if isinstance(block, Block)]
    stream = torch.zeros(net.space.width, device=net.pos_embed.device)
    for block in blocks:
        hidden = block.fc1.weight.abs().sum(1) + block.fc2.weight.abs().sum(0)
        order = hidden.argsort(descending=True, stable=True)
        block.fc1.weight.copy_(block.fc1.weight[order])
        block.fc1.bias.copy_(block.fc1.bias[order])
        block.fc2.weight.copy_(block.fc2.weight[:, order])
        stream += block.qkv_weight.abs().sum((0, 1)) + block.proj.weight.abs().sum(1)
        stream += block.fc1.weight.abs().sum(0) + block.fc2.weight.abs().sum(1)
    order = stream.argsort(descending=True, stable=True)
    for parameter in (net.cls_token, net.reg_token, net.pos_embed):
        if parameter is not None:
            parameter.copy_(parameter[..., order])
    net.patch_embed.weight.copy_(net.patch_embed.weight[order])
    assert net.patch_embed.bias is not None
    net.patch_embed.bias.copy_(net.patch_embed.bias[order])
    norms = [net.norm_pre, net.norm, net.fc_norm, *(n for block in blocks for n in (block.norm1, block.norm2))]
    for norm in norms:
        if norm is not None:
            norm.weight.copy_(norm.weight[order])
            norm.bias.copy_(norm.bias[order])
    for block in blocks:
        block.qkv_weight.copy_(block.qkv_weight[..., order])
        block.fc1.weight.copy_(block.fc1.weight[:, order])
        for layer in (block.proj, block.fc2, *((block.residual,) if block.residual is not None else ())):
            layer.weight.copy_(layer.weight[order])
            layer.bias.copy_(layer.bias[order])
        if block.residual is not None:
            block.residual.weight.copy_(block.residual.weight[:, order])
        for scale in (block.scale1, block.scale2):
            if scale is not None:
                scale.copy_(scale[order])
    net.head.weight.copy_(net.head.weight[:, order])


@torch.no_grad()
def resized(net: MetaViT, image_size: int) -> MetaViT:
    """A copy for another image size, its position embedding interpolated (bicubic, timm's rule).

    Raises:
        InputError: the size is not a multiple of the patch.
    """
    if image_size < net.patch_size or image_size % net.patch_size:
        raise InputError("image size", found=image_size, expected=f"a multiple of the patch size {net.patch_size}")
    new = copy.deepcopy(net)
    side = image_size // net.patch_size
    new.image_size, new.patches = image_size, side**2
    new.tokens = new.patches + net.prefix
    positions = resample_abs_pos_embed(net.pos_embed, [side, side], num_prefix_tokens=net.prefix)
    new.pos_embed = nn.Parameter(positions)
    return new
