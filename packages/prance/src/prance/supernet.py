"""The meta-network: one vision transformer whose prefix slices are its subnets (PRANCE, section on the meta-network).

Here are the weights and how they are made; how they are run is in `executor`. Queries, keys and values are stored
de-interleaved, as (3, D, S).
"""

from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float
from papercore.errors import InputError
from torch import Tensor, nn

from prance.decision import Decision
from prance.space import SearchSpace

if TYPE_CHECKING:
    from prance.executor import Path, Policy

Pool = Literal["token", "avg"]


class Block(nn.Module):
    """Weights of one pre-norm block."""

    def __init__(
        self,
        space: SearchSpace,
        *,
        projected: bool,
        eps: float,
        layer_scale: bool = False,
        bias: bool = True,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        width, attention, hidden = space.width, space.attention, space.hidden
        self.norm1 = nn.LayerNorm(width, eps)
        self.qkv_weight = nn.Parameter(torch.empty(3, attention, width))
        self.qkv_bias = nn.Parameter(torch.zeros(3, attention)) if bias else None
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        self.proj = nn.Linear(attention, width)
        self.norm2 = nn.LayerNorm(width, eps)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.residual = nn.Linear(width, width) if projected else None
        """the residual projection of the last block of a group"""
        self.scale1 = nn.Parameter(torch.ones(width)) if layer_scale else None
        self.scale2 = nn.Parameter(torch.ones(width)) if layer_scale else None
        self.drop_path = drop_path


class MetaViT(nn.Module):
    """A vision transformer that runs at any width, MLP ratio and number of tokens of its space.

    Args:
        space: the choices and the geometry.
        num_classes: outputs of the head.
        image_size, patch_size: pixels, square; the size divides by the patch.
        channels: of the images.
        class_token: whether there is one; without it tokens are ranked by the attention that they receive.
        registers: further prefix tokens.
        pool: "token" classifies the class token, "avg" the mean of the patch tokens.
        eps: of the layer norms; the reference has 1e-5, timm 1e-6.
        identity_residual: residual projections start at the identity; False draws them as the reference does.
        drop_path: of the last block; rises linearly from 0.

    Raises:
        InputError: sizes that do not divide, or pooling without what it pools.
    """

    def __init__(
        self,
        space: SearchSpace,
        num_classes: int = 1000,
        *,
        image_size: int = 224,
        patch_size: int = 16,
        channels: int = 3,
        class_token: bool = True,
        registers: int = 0,
        pool: Pool = "token",
        eps: float = 1e-5,
        layer_scale: bool = False,
        qkv_bias: bool = True,
        residual_projection: bool = True,
        identity_residual: bool = True,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        if patch_size < 1 or image_size < patch_size or image_size % patch_size:
            raise InputError("image size", found=image_size, expected=f"a multiple of the patch size {patch_size}")
        if num_classes < 1:
            raise InputError("num_classes", found=num_classes, expected="at least 1")
        if pool not in ("token", "avg"):
            raise InputError("pool", found=pool, expected="token or avg")
        if pool == "token" and not class_token:
            raise InputError("pool", found="token without a class token", expected="avg")
        self.space, self.num_classes, self.pool, self.eps = space, num_classes, pool, eps
        self.image_size, self.patch_size, self.channels = image_size, patch_size, channels
        self.prefix = int(class_token) + registers
        """tokens before the patches"""
        width = space.width
        self.patch_embed = nn.Conv2d(channels, width, patch_size, patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width)) if class_token else None
        self.reg_token = nn.Parameter(torch.zeros(1, registers, width)) if registers else None
        self.patches = (image_size // patch_size) ** 2
        self.tokens = self.patches + self.prefix
        """N: tokens of an image before any reduction, and the length of a selector's state"""
        self.least = max(1, self.prefix + (pool == "avg"))
        """tokens that no reduction goes below: prefix tokens, and a patch where patches are pooled"""
        self.pos_embed = nn.Parameter(torch.zeros(1, self.tokens, width))
        """zero for prefix tokens that have no position"""
        self.norm_pre: nn.LayerNorm | None = None
        """a norm before the first block, as some timm models have it"""
        projected = space.projected if residual_projection else ()
        self.blocks = nn.ModuleList(
            Block(
                space,
                projected=i in projected,
                eps=eps,
                layer_scale=layer_scale,
                bias=qkv_bias,
                drop_path=drop_path * i / max(1, space.depth - 1),
            )
            for i in range(space.depth)
        )
        self.norm: nn.LayerNorm | None = nn.LayerNorm(width, eps)
        self.fc_norm: nn.LayerNorm | None = None
        """a norm after pooling, as some timm models have it"""
        self.head = nn.Linear(width, num_classes)
        self.reset(identity_residual)

    def reset(self, identity_residual: bool = True) -> None:
        """Draws all weights: truncated normal of deviation 0.02, biases 0, norms 1 and 0 (reference code)."""
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                nn.init.trunc_normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.ones_(parameter)
        for block in self.blocks:
            assert isinstance(block, Block)
            if block.residual is not None and identity_residual:
                nn.init.eye_(block.residual.weight)

    def forward(
        self,
        images: Float[Tensor, "batch channels height width"],
        decision: Decision | None = None,
        *,
        path: "Path | None" = None,
        mean: Literal["mean", "size_mean"] = "mean",
        policy: "Policy | None" = None,
    ) -> Float[Tensor, "batch classes"]:
        """Logits.

        Args:
            decision: one for all images, or one for each; None: the largest.
            path: "sliced" computes only what a decision keeps and needs equal decisions; "masked" computes everything
                and masks, with gradients, for any decisions; "packed" and "bucketed" compute only what is kept, for
                any decisions. All give the same logits. None: sliced if the decisions are equal, else masked.
            mean: how merged tokens are averaged, see `merge_tokens`.
            policy: decides the later groups on the way; its states carry no gradient.

        Raises:
            InputError: images of another size or number of channels, or another number of decisions.
        """
        from prance.executor import execute

        decision = Decision.largest(self.space) if decision is None else decision
        decision = decision.expand(len(images))
        if path is None:
            path = "sliced" if decision.uniform else "masked"
        return execute(self, images, decision, path=path, mean=mean, policy=policy).logits

    def check_images(self, images: Tensor) -> None:
        """Raises InputError unless the images fit."""
        expected = (self.channels, self.image_size, self.image_size)
        if images.ndim != 4 or tuple(images.shape[1:]) != expected:
            raise InputError(
                "images",
                found=tuple(images.shape),
                expected=f"(batch, {', '.join(map(str, expected))})",
                hint="resize the images, or the network with `resized`",
            )
        finite = torch.isfinite(images).flatten(1).all(1) if len(images) else torch.ones(0, dtype=torch.bool)
        if not bool(finite.all()):
            bad = (~finite).nonzero().flatten().tolist()
            raise InputError(f"pixels of images {bad[:10]}", found="NaN or infinity", expected="finite numbers")
