"""A static subnet cut out of a meta-network: a plain module, and ONNX.

One decision for all images fixes every width and every number of tokens, so that the subnet needs neither the super
weights nor a selector: its weights are copies of the slices, its token reduction has static counts.
"""

import copy
import dataclasses
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from papercore.errors import InputError, WorkError
from torch import Tensor, nn

from prance.decision import Decision, keep_count
from prance.macs import Geometry, active_parameters, macs, token_counts
from prance.sliced import fit_width
from prance.supernet import Block, MetaViT
from prance.tokens import Mean


@dataclasses.dataclass(frozen=True)
class Reduction:
    """Numbers of tokens at one decision point."""

    pruned: int
    """kept by pruning"""
    merged: int
    """left after merging"""
    prefix: int
    mean: Mean


class StaticBlock(nn.Module):
    """One block of fixed widths; `reduction` is None where no token goes."""

    def __init__(self, source: Block, width: int, hidden: int, out: int, heads: int, reduction: Reduction | None):
        super().__init__()
        self.heads, self.out, self.reduction = heads, out, reduction
        self.norm1 = cut_norm(source.norm1, width)
        attention, kind = source.qkv_weight.shape[1], like(source.qkv_weight)
        self.qkv = nn.Linear(width, 3 * attention, bias=source.qkv_bias is not None, **kind)
        self.qkv.weight.copy_(source.qkv_weight.reshape(3 * attention, -1)[:, :width])
        if source.qkv_bias is not None:
            self.qkv.bias.copy_(source.qkv_bias.reshape(-1))
        self.q_norm, self.k_norm = copy.deepcopy(source.q_norm), copy.deepcopy(source.k_norm)
        self.proj = cut_linear(source.proj, attention, width, source.scale1)
        self.norm2 = cut_norm(source.norm2, width)
        self.fc1 = cut_linear(source.fc1, width, hidden)
        self.fc2 = cut_linear(source.fc2, hidden, out, source.scale2)
        self.residual = None if source.residual is None else cut_linear(source.residual, width, out)

    def forward(
        self, x: Float[Tensor, "batch tokens width"], size: Float[Tensor, "batch tokens"] | None
    ) -> tuple[Float[Tensor, "batch kept out"], Float[Tensor, "batch kept"] | None]:
        """Tokens, and how many patches each stands for (None: one each)."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q).to(v), self.k_norm(k).to(v)
        bias = None if size is None else size.log()[:, None, None, :].to(q)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        x = x + self.proj(y.transpose(1, 2).flatten(2))
        if self.reduction is not None:
            x, size = reduce_static(x, size, q, k, bias, self.reduction)
        y = self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return (fit_width(x, self.out) if self.residual is None else self.residual(x)) + y, size


class StaticViT(nn.Module):
    """A plain vision transformer: the subnet that one decision selects.

    Equal scores at a decision point are kept in an order that the backend chooses; everything else is what the
    meta-network computes.

    Raises:
        InputError: decisions that differ.
    """

    @torch.no_grad()
    def __init__(self, net: MetaViT, decision: Decision, mean: Mean = "mean") -> None:
        super().__init__()
        if len(decision) == 0 or not decision.uniform:
            raise InputError("decisions", found="none or several", expected="one for all images")
        decision = decision[:1]
        geometry = Geometry.of(net)
        self.image_size, self.channels, self.num_classes = net.image_size, net.channels, net.num_classes
        self.prefix, self.average = net.prefix, net.pool == "avg"
        self.macs = int(macs(geometry, decision))
        self.active_parameters = int(active_parameters(geometry, decision))
        width, last = int(decision.embed[0, 0]), int(decision.embed[0, -1])
        self.patch_embed = nn.Conv2d(net.channels, width, net.patch_size, net.patch_size, **like(net.pos_embed))
        self.patch_embed.weight.copy_(net.patch_embed.weight[:width])
        assert net.patch_embed.bias is not None and self.patch_embed.bias is not None
        self.patch_embed.bias.copy_(net.patch_embed.bias[:width])
        prefix = [token[..., :width] for token in (net.cls_token, net.reg_token) if token is not None]
        positions = net.pos_embed[..., :width]
        self.prefix_tokens = None
        if prefix:
            self.prefix_tokens = nn.Parameter(torch.cat(prefix, 1) + positions[:, : net.prefix])
        self.pos_embed = nn.Parameter(positions[:, net.prefix :].clone())
        self.norm_pre = None if net.norm_pre is None else cut_norm(net.norm_pre, width)
        before, after = token_counts(decision, geometry)
        blocks = []
        for i, source in enumerate(net.blocks):
            assert isinstance(source, Block)
            n, kept = int(before[0, i]), int(after[0, i])
            reduction = None
            if kept < n:
                share = decision.prune[:, net.space.points.index(i)]
                pruned = int(keep_count(share, before[:, i], net.least))
                reduction = Reduction(pruned, kept, net.prefix, mean)
            own, hidden, out = (int(v[0, i]) for v in (decision.embed, decision.hidden, decision.output))
            blocks.append(StaticBlock(source, own, hidden, out, net.space.heads, reduction))
        self.blocks = nn.ModuleList(blocks)
        self.norm = None if net.norm is None else cut_norm(net.norm, last)
        self.fc_norm = None if net.fc_norm is None else cut_norm(net.fc_norm, last)
        self.head = cut_linear(net.head, last, net.num_classes)
        self.eval()

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Logits."""
        x = self.patch_embed(images).flatten(2).transpose(1, 2) + self.pos_embed
        if self.prefix_tokens is not None:
            x = torch.cat([self.prefix_tokens.expand(x.shape[0], -1, -1), x], 1)
        if self.norm_pre is not None:
            x = self.norm_pre(x)
        size = None
        for block in self.blocks:
            x, size = block(x, size)
        x = x if self.norm is None else self.norm(x)
        x = x[:, self.prefix :].mean(1) if self.average else x[:, 0]
        return self.head(x if self.fc_norm is None else self.fc_norm(x))


def like(weight: Tensor) -> dict[str, Any]:
    """Where and in what precision new weights are made."""
    return {"device": weight.device, "dtype": weight.dtype}


def cut_norm(norm: nn.LayerNorm, width: int) -> nn.LayerNorm:
    """A layer norm over the first channels."""
    made = nn.LayerNorm(width, norm.eps, **like(norm.weight))
    made.weight.copy_(norm.weight[:width])
    made.bias.copy_(norm.bias[:width])
    return made


def cut_linear(layer: nn.Linear, inputs: int, outputs: int, scale: Tensor | None = None) -> nn.Linear:
    """The first inputs and outputs; a LayerScale behind it is multiplied into it."""
    made = nn.Linear(inputs, outputs, **like(layer.weight))
    weight, bias = layer.weight[:outputs, :inputs], layer.bias[:outputs]
    made.weight.copy_(weight if scale is None else weight * scale[:outputs, None])
    made.bias.copy_(bias if scale is None else bias * scale[:outputs])
    return made


def reduce_static(
    x: Float[Tensor, "batch tokens width"],
    size: Float[Tensor, "batch tokens"] | None,
    q: Float[Tensor, "batch heads tokens channels"],
    k: Float[Tensor, "batch heads tokens channels"],
    bias: Float[Tensor, "batch one one tokens"] | None,
    counts: Reduction,
) -> tuple[Float[Tensor, "batch kept width"], Float[Tensor, "batch kept"] | None]:
    """Prunes and merges to fixed counts, with operations that ONNX has."""
    prefix, pruned, merged = counts.prefix, counts.pruned, counts.merged
    q = q[:, :, :1] if prefix else q
    kind = torch.promote_types(q.dtype, torch.float32)
    logits = (q.to(kind) @ k.to(kind).transpose(-1, -2)) * q.shape[-1] ** -0.5
    logits = logits if bias is None else logits + bias.to(kind)
    scores = logits.softmax(-1).mean(1).mean(1)[:, prefix:]
    order = scores.topk(pruned - prefix, 1).indices + prefix
    x = torch.cat([x[:, :prefix], x.gather(1, order[:, :, None].expand(-1, -1, x.shape[2]))], 1)
    if size is not None:
        size = torch.cat([size[:, :prefix], size.gather(1, order)], 1)
    if merged == pruned:
        return x, size
    precise = x.to(kind)
    unit = precise / precise.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(kind).tiny)
    first = prefix if merged > prefix else max(0, merged - 1)
    target = (unit[:, merged:] @ unit[:, first:merged].transpose(1, 2)).argmax(-1) + first
    belongs = (torch.arange(merged, device=x.device)[:, None] == target[:, None, :]).to(kind)
    sizes = x.new_ones(1, pruned).to(kind) if size is None else size
    weight = torch.ones_like(sizes) if counts.mean == "mean" else sizes
    parts = weight[:, :merged] + (belongs * weight[:, None, merged:]).sum(2)
    total = precise[:, :merged] * weight[:, :merged, None] + belongs @ (precise[:, merged:] * weight[:, merged:, None])
    size = sizes[:, :merged] + (belongs * sizes[:, None, merged:]).sum(2)
    return (total / parts[:, :, None]).to(x.dtype), size


@dataclasses.dataclass(frozen=True)
class Exported:
    """An ONNX file and how far it is from the module."""

    path: Path
    difference: float
    """largest difference of a logit between onnxruntime and torch, over the images of all checked batches"""
    opset: int
    macs: int
    parameters: int


def export_onnx(
    module: StaticViT, path: Path | str, *, opset: int = 17, tolerance: float = 1e-4, images: Tensor | None = None
) -> Exported:
    """Writes the module as ONNX, with any batch size, and compares it with onnxruntime on batches of 1 and 3.

    Args:
        opset: of ONNX, at least 17.
        tolerance: the largest difference of a logit, as a share of the largest logit or of 1.
        images: to compare on; None: random ones.

    Raises:
        InputError: onnx or onnxruntime is not installed, or the module is not in float32 on the CPU.
        WorkError: the file gives other logits; the file is removed.
    """
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise InputError("onnx", found="not installed", expected="onnx and onnxruntime", hint="extra onnx") from error
    if module.head.weight.dtype != torch.float32 or module.head.weight.device.type != "cpu":
        raise InputError("module", found=f"{module.head.weight.dtype}", expected="float32 on the CPU")
    if opset < 17:
        raise InputError("opset", found=opset, expected="at least 17")
    path, module = Path(path), module.eval()
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (module.channels, module.image_size, module.image_size)
    if images is None:
        images = torch.randn(4, *shape, generator=torch.Generator().manual_seed(0))
    partial = path.with_name(path.name + ".part")
    with warnings.catch_warnings(), torch.no_grad():
        # tracing is what is wanted: all shapes but the batch are fixed
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            (images[:2],),
            str(partial),
            dynamo=False,
            opset_version=opset,
            input_names=["images"],
            output_names=["logits"],
            dynamic_axes={"images": {0: "batch"}, "logits": {0: "batch"}},
        )
    try:
        onnx.checker.check_model(str(partial))
        session: Any = onnxruntime.InferenceSession(str(partial), providers=["CPUExecutionProvider"])
        difference, largest = 0.0, 1.0
        for batch in (images[:1], images[1:]):
            with torch.no_grad():
                expected = module(batch)
            found = torch.from_numpy(session.run(None, {"images": batch.numpy()})[0])
            difference = max(difference, float((found - expected).abs().max())) if len(batch) else difference
            largest = max(largest, float(expected.abs().max())) if len(batch) else largest
        if not difference <= tolerance * largest:
            raise WorkError(f"{path}: onnxruntime's logits differ by {difference:g}, at most {tolerance * largest:g}")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return Exported(path, difference, opset, module.macs, module.active_parameters)
