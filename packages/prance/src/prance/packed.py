"""The packed path: the live tokens of all images in one matrix, so that products stay large. Inference.

Rows of images that share a width go through one product. Where few rows share one, a product of several widths, padded
with zeros, costs less than several small products (`gathered`). Attention runs image by image, images with the same
number of tokens together, or as one call of variable-length attention where that exists (CUDA) and all tokens weigh
the same.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from prance.decision import Decision, keep_count
from prance.engine import Attended
from prance.sliced import (
    attention_scores,
    embedded,
    pooled,
    queries_keys_values,
    reduced,
    size_bias,
    sliced_linear,
    sliced_norm,
)
from prance.supernet import Block, MetaViT
from prance.tokens import Mean, TokenBatch

SMALL, SMALL_CUDA = 16, 512
"""rows whose product costs what a product costs beside its rows (measured on a CPU; estimated for a GPU)"""
IN_ORDER = 32
"""images up to which a single product leaves the rows where they are"""
Run = tuple[tuple[int, ...], int, int]
"""(key, first row, row after the last)"""


@dataclasses.dataclass(frozen=True)
class Rows:
    """Tokens of all images, one after the other."""

    x: Float[Tensor, "tokens channels"]
    """zero beyond an image's width; as wide as the widest image"""
    size: Float[Tensor, " tokens"]
    count: Int[Tensor, " batch"]
    """of every image, on the CPU"""
    origin: Int[Tensor, "batch original"]
    plain: bool = True
    """no token of any image has been merged: all sizes are 1, known without asking the device"""

    @property
    def starts(self) -> Tensor:
        """Where every image begins, and the end; on the CPU."""
        return F.pad(self.count.cumsum(0), (1, 0))


class Packed:
    """See the module. `flow` is Rows."""

    def __init__(self, net: MetaViT, mean: Mean) -> None:
        self.net = net
        self.mean: Mean = mean

    @torch.no_grad()
    def begin(self, images: Tensor, decision: Decision) -> Rows:
        width = int(decision.embed[:, 0].max())
        x = embedded(self.net, images, width)
        tokens = TokenBatch.start(x)
        rows = Rows(x.reshape(-1, width), tokens.size.reshape(-1), tokens.count, tokens.origin)
        parts = []
        for where, (own,) in self.alike(rows, decision.embed[:, 0]):
            part = take(rows.x, where)[:, :own]
            parts.append((where, part if self.net.norm_pre is None else sliced_norm(self.net.norm_pre, part)))
        return dataclasses.replace(rows, x=assembled(parts, len(rows.x), width))

    @torch.no_grad()
    def attend(self, block: int, flow: Rows, decision: Decision, scores: bool, state: bool) -> Attended:
        weights = self.net.blocks[block]
        assert isinstance(weights, Block)
        heads, embed = self.net.space.heads, decision.embed[:, block]
        together = self.gathered(flow, embed[:, None], lambda key: key[0])
        parts = []
        for where, runs in together:
            normed = run_norm(weights.norm1, take(flow.x, where), runs)
            parts.append((where, queries_keys_values(weights, normed, heads).flatten(1)))
        qkv = assembled(parts, len(flow.x), parts[0][1].shape[1]).view(len(flow.x), 3, heads, -1)
        out = self.attention(qkv, flow).flatten(1)
        parts = []
        for where, runs in together:
            width = widest(runs, 0)
            y = sliced_linear(weights.proj, take(out, where), width)
            if weights.scale1 is not None:
                y = y * weights.scale1[:width]
            y += take(flow.x, where)[:, :width]
            parts.append((where, cut_runs(y, runs, 0)))
        x = assembled(parts, len(flow.x), int(embed.max()))
        ranks = self.scores(qkv, flow) if scores else None
        keys = None
        if state:
            mean = qkv[:, 1].mean((1, 2)).to(torch.promote_types(qkv.dtype, torch.float32))
            keys = self.padded(mean[:, None], flow, self.net.tokens)[:, :, 0]
        return Attended(dataclasses.replace(flow, x=x), ranks, keys)

    def attention(self, qkv: Float[Tensor, "tokens three heads channels"], flow: Rows) -> Tensor:
        """[tokens, heads, channels]"""
        if qkv.is_cuda and flow.plain:
            return _variable_length_attention(qkv, flow)
        parts = []
        for images, where, n in self.same_count(flow):
            q, k, v = take(qkv, where).unflatten(0, (len(images), n)).permute(2, 0, 3, 1, 4)
            bias = None if flow.plain else size_bias(take(flow.size, where).view(len(images), n))
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=None if bias is None else bias.to(q.dtype))
            parts.append((where, out.transpose(1, 2).flatten(0, 1)))
        return assembled(parts, len(qkv), qkv.shape[2:])

    def scores(self, qkv: Float[Tensor, "tokens three heads channels"], flow: Rows) -> Tensor:
        """[tokens]"""
        parts = []
        for images, where, n in self.same_count(flow):
            q, k, _ = take(qkv, where).unflatten(0, (len(images), n)).permute(2, 0, 3, 1, 4)
            bias = None if flow.plain else size_bias(take(flow.size, where).view(len(images), n))
            alive = torch.ones(len(images), n, dtype=torch.bool, device=q.device)
            parts.append((where, attention_scores(q, k, bias, self.net.prefix, alive).reshape(-1, 1)))
        return assembled(parts, len(qkv), 1)[:, 0]

    @torch.no_grad()
    def reduce(self, point: int, flow: Rows, scores: Tensor, decision: Decision) -> Rows:
        slots = int(flow.count.max())
        x, size = self.padded(flow.x, flow, slots), self.padded(flow.size[:, None], flow, slots)[:, :, 0]
        ranks = self.padded(scores[:, None], flow, slots)[:, :, 0]
        tokens = TokenBatch(x, size, flow.count, flow.origin)
        tokens = reduced(tokens, ranks, decision, point, self.net, self.mean)
        live = tokens.alive
        pruned = keep_count(decision.prune[:, point], flow.count, self.net.least)
        plain = flow.plain and torch.equal(tokens.count, pruned)
        return Rows(tokens.x[live], tokens.size[live], tokens.count, tokens.origin, plain)

    @torch.no_grad()
    def feed(self, block: int, flow: Rows, decision: Decision) -> Rows:
        weights = self.net.blocks[block]
        assert isinstance(weights, Block)
        key = torch.stack([decision.embed[:, block], decision.hidden[:, block], decision.output[:, block]], 1)
        parts = []
        for where, runs in self.gathered(flow, key, lambda key: key[1] * (key[0] + key[2])):
            x, out = take(flow.x, where), widest(runs, 2)
            y = sliced_linear(weights.fc1, run_norm(weights.norm2, x, runs), widest(runs, 1))
            y = sliced_linear(weights.fc2, cut_runs(F.gelu(y), runs, 1), out)
            if weights.scale2 is not None:
                y = y * weights.scale2[:out]
            if weights.residual is not None:
                y += sliced_linear(weights.residual, x[:, : widest(runs, 0)], out)
            else:
                shared = min(x.shape[1], out)
                y[:, :shared] += x[:, :shared]
            parts.append((where, cut_runs(y, runs, 2)))
        return dataclasses.replace(flow, x=assembled(parts, len(flow.x), int(key[:, 2].max())))

    @torch.no_grad()
    def head(self, flow: Rows, decision: Decision) -> Tensor:
        net = self.net
        parts = []
        for images, where, n in self.same_count(flow):
            x = take(flow.x, where).view(len(images), n, -1)
            widths = decision.embed[images, -1]
            for width in widths.unique().tolist():
                chosen = (widths == width).nonzero().flatten()
                y = take(x, None if len(chosen) == len(images) else chosen.to(x.device))[..., :width]
                y = pooled(net, y if net.norm is None else sliced_norm(net.norm, y))
                if net.fc_norm is not None:
                    y = sliced_norm(net.fc_norm, y)
                parts.append((images[chosen].to(x.device), sliced_linear(net.head, y, net.num_classes)))
        return assembled(parts, len(flow.count), net.num_classes)

    def count(self, flow: Rows) -> Tensor:
        return flow.count

    def origin(self, flow: Rows) -> Tensor:
        return flow.origin

    # ---- which rows belong together

    def alike(self, flow: Rows, key: Int[Tensor, "batch *fields"]) -> Iterator[tuple[Tensor | None, list[int]]]:
        """(row numbers, None for all; the key they share) for every key that occurs."""
        key = key[:, None] if key.ndim == 1 else key
        values, group = key.unique(dim=0, return_inverse=True)
        if len(values) == 1:
            yield None, values[0].tolist()
            return
        of_row = group.repeat_interleave(flow.count)
        for number, value in enumerate(values.tolist()):
            yield (of_row == number).nonzero().flatten().to(flow.x.device), value

    def gathered(
        self, flow: Rows, key: Int[Tensor, "batch fields"], cost: Callable[[tuple[int, ...]], int]
    ) -> list[tuple[Tensor | None, list[Run]]]:
        """(row numbers, None for all in their order; runs of rows that share a key) for every product.

        A key joins the product of larger ones when its rows, padded, cost less than a product of their own: a product
        of few rows costs as much as one of `SMALL` rows more.

        Args:
            cost: of one row.
        """
        values, group = key.unique(dim=0, return_inverse=True)
        keys = [tuple(value) for value in values.tolist()]
        rows = torch.zeros(len(keys), dtype=torch.long).index_add(0, group, flow.count).tolist()
        small = SMALL_CUDA if flow.x.is_cuda else SMALL
        joined: list[list[int]] = []
        for number in sorted(range(len(keys)), key=lambda i: cost(keys[i]), reverse=True):
            own = cost(keys[number])
            if joined:
                members = [*joined[-1], number]
                largest = tuple(max(field) for field in zip(*(keys[i] for i in members), strict=True))
                before = tuple(max(field) for field in zip(*(keys[i] for i in joined[-1]), strict=True))
                extra = rows[number] * (cost(largest) - own)
                extra += sum(rows[i] for i in joined[-1]) * (cost(largest) - cost(before))
                if extra <= small * own:
                    joined[-1].append(number)
                    continue
            joined.append([number])
        if len(joined) == 1 and len(group) <= IN_ORDER:
            runs = [
                (keys[number], start, start + n)
                for number, start, n in zip(group.tolist(), flow.starts.tolist(), flow.count.tolist(), strict=False)
            ]
            return [(None, [(keys[0], 0, len(flow.x))] if len(keys) == 1 else runs)]
        if len(keys) == 1:
            return [(None, [(keys[0], 0, len(flow.x))])]
        of_row = group.repeat_interleave(flow.count)
        places = [(of_row == number).nonzero().flatten() for number in range(len(keys))]
        made: list[tuple[Tensor | None, list[Run]]] = []
        for members in joined:
            ends = torch.tensor([rows[i] for i in members]).cumsum(0).tolist()
            runs = [(keys[i], end - rows[i], end) for i, end in zip(members, ends, strict=True)]
            made.append((torch.cat([places[i] for i in members]).to(flow.x.device), runs))
        return made

    def same_count(self, flow: Rows) -> Iterator[tuple[Tensor, Tensor | None, int]]:
        """(images, their row numbers or None for all, their number of tokens) for every number that occurs."""
        counts = flow.count.unique().tolist()
        if len(counts) == 1:
            yield torch.arange(len(flow.count)), None, counts[0]
            return
        of_row = flow.count.repeat_interleave(flow.count)
        for n in counts:
            images = (flow.count == n).nonzero().flatten()
            yield images, (of_row == n).nonzero().flatten().to(flow.x.device), n

    def padded(self, rows: Tensor, flow: Rows, slots: int) -> Tensor:
        """[batch, slots, ...] with zeros where an image has no token."""
        batch = len(flow.count)
        image = torch.arange(batch).repeat_interleave(flow.count)
        slot = torch.arange(len(rows)) - flow.starts[:-1].repeat_interleave(flow.count)
        whole = rows.new_zeros(batch * slots, *rows.shape[1:])
        whole[(image * slots + slot).to(rows.device)] = rows
        return whole.view(batch, slots, *rows.shape[1:])


def widest(runs: list[Run], field: int) -> int:
    """The largest value of a field of the key."""
    return max(key[field] for key, _, _ in runs)


def run_norm(norm: nn.LayerNorm, x: Float[Tensor, "rows channels"], runs: list[Run]) -> Float[Tensor, "rows widest"]:
    """Layer norm of every run over its own width, the key's first field; zero beyond."""
    if len(runs) == 1:
        return sliced_norm(norm, x[:, : runs[0][0][0]])
    whole = x.new_zeros(len(x), widest(runs, 0))
    for (width, *_), start, end in runs:
        whole[start:end, :width] = sliced_norm(norm, x[start:end, :width])
    return whole


def cut_runs(x: Float[Tensor, "rows channels"], runs: list[Run], field: int) -> Float[Tensor, "rows channels"]:
    """With zeros in every run beyond a field of its key, in place."""
    for key, start, end in runs:
        if key[field] < x.shape[1]:
            x[start:end, key[field] :] = 0
    return x


def take(rows: Tensor, where: Tensor | None) -> Tensor:
    """Some rows; None takes all without a copy."""
    return rows if where is None else rows.index_select(0, where)


def assembled(parts: list[tuple[Tensor | None, Tensor]], rows: int, shape: Any) -> Tensor:
    """One tensor of `rows` rows from parts of them; narrower parts are filled up with zeros."""
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    if len(parts) == 1 and tuple(parts[0][1].shape[1:]) == shape and len(parts[0][1]) == rows and parts[0][0] is None:
        return parts[0][1]
    narrow = any(tuple(part.shape[1:]) != shape for _, part in parts)
    whole = parts[0][1].new_zeros(rows, *shape) if narrow else parts[0][1].new_empty(rows, *shape)
    for where, part in parts:
        view = whole[:, : part.shape[1]]
        if where is None:
            view.copy_(part)
        else:
            view.index_copy_(0, where, part)
    return whole


def _variable_length_attention(qkv: Tensor, flow: Rows) -> Tensor:
    """One kernel for all images; needs CUDA, half precision and torch.nn.attention.varlen."""
    if qkv.dtype in (torch.float16, torch.bfloat16):
        from torch.nn.attention.varlen import varlen_attn

        starts = flow.starts.to(qkv.device, torch.int32)
        longest = int(flow.count.max())
        q, k, v = (part.contiguous() for part in qkv.unbind(1))
        out = varlen_attn(q, k, v, starts, starts, longest, longest)
        return out[0] if isinstance(out, tuple) else out
    ragged = [torch.nested.nested_tensor_from_jagged(part, flow.starts.to(qkv.device)) for part in qkv.unbind(1)]
    q, k, v = (part.transpose(1, 2) for part in ragged)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).values()
