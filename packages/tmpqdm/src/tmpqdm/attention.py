"""Attention whose two products are quantised: q, k, v and the softmax matrix, each with bits of its own.

A processor for `diffusers.models.attention_processor.Attention`, so that every model built on it (UNet2DModel,
UNet2DConditionModel, DiTTransformer2DModel) is covered. q and k are quantised before they are scaled; with one step for
a tensor the place of the scale makes no difference. The softmax matrix is never negative and is quantised with zero
point 0; without softmax bits it is never formed and the fused attention runs.
"""

from typing import Any

import torch.nn.functional as F
from papercore.errors import InputError
from torch import Tensor, nn

from tmpqdm.quantisers import Step

STANDARD = ("AttnProcessor", "AttnProcessor2_0")
"""the processors that compute what ours computes"""

QKV = ("q", "k", "v")


class QuantAttention(nn.Module):
    """The processor.

    Args:
        softmax: whether the softmax matrix is quantised; then it is formed also while all bits are off.
    """

    def __init__(self, softmax: bool) -> None:
        super().__init__()
        self.softmax = softmax
        self.genes = (*QKV, "p") if softmax else QKV
        self.steps: dict[str, dict[int, Step]] = {gene: {} for gene in self.genes}
        self.bits: dict[str, int | None] = dict.fromkeys(self.genes)
        self.acts: dict[str, Any] = dict.fromkeys((*QKV, "p"))

    def use(self, **bits: int | None) -> None:
        """Switches the given genes; None is full precision."""
        for gene, width in bits.items():
            self.bits[gene] = width
            self.acts[gene] = None if width is None else self.steps[gene][width]

    def set(self, gene: str, bits: int | None) -> None:
        self.use(**{gene: bits})

    def __deepcopy__(self, memo: dict[int, Any]) -> "QuantAttention":
        import copy

        made = QuantAttention(self.softmax)
        made.steps = copy.deepcopy(self.steps, memo)
        made.use(**self.bits)
        return made

    def _apply(self, fn: Any, recurse: bool = True) -> "QuantAttention":
        super()._apply(fn, recurse)
        for steps in self.steps.values():
            for width, step in steps.items():
                steps[width] = step.to(fn(step.delta).device)
        self.use(**self.bits)
        return self

    def __call__(  # not forward: diffusers reads the names of its arguments
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        shape = hidden_states.shape
        if hidden_states.ndim == 4:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        batch, tokens = source.shape[:2]
        if attention_mask is not None:
            mask: Tensor = attn.prepare_attention_mask(attention_mask, tokens, batch)
            attention_mask = mask.view(batch, attn.heads, -1, mask.shape[-1])
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        if encoder_hidden_states is None:
            source = hidden_states
        elif attn.norm_cross:
            source = attn.norm_encoder_hidden_states(source)

        q, k, v = (
            layer(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for layer, x in ((attn.to_q, hidden_states), (attn.to_k, source), (attn.to_v, source))
        )
        if attn.norm_q is not None:
            q = attn.norm_q(q)
        if attn.norm_k is not None:
            k = attn.norm_k(k)
        mixed = self.attend(q, k, v, attn.scale, attention_mask)
        hidden_states = attn.to_out[1](attn.to_out[0](mixed.transpose(1, 2).flatten(2)))
        if len(shape) == 4:
            hidden_states = hidden_states.transpose(-1, -2).reshape(shape)
        if attn.residual_connection:
            hidden_states = hidden_states + residual
        return hidden_states / attn.rescale_output_factor if attn.rescale_output_factor != 1 else hidden_states

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
        """softmax(q k^T scale + mask) v with the quantisers in place; [batch, heads, tokens, head size]."""
        acts = self.acts
        q, k, v = (x if act is None else act(x) for x, act in ((q, acts["q"]), (k, acts["k"]), (v, acts["v"])))
        if not self.softmax:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        scores = (q @ k.transpose(-1, -2)) * scale
        if mask is not None:
            scores = scores + mask
        weights = scores.softmax(-1)
        act = acts["p"]
        return (weights if act is None else act(weights)) @ v


def check_processor(name: str, attention: nn.Module) -> None:
    """Raises InputError for an attention that computes something else than the standard processors."""
    kind = type(attention.processor).__name__
    if kind not in STANDARD:
        raise InputError(
            f"attention processor of {name}", found=kind, expected=" or ".join(STANDARD),
            hint="call model.set_attn_processor(AttnProcessor2_0()) if the model allows it",
        )  # fmt: skip
    if getattr(attention, "added_kv_proj_dim", None) is not None:
        raise InputError(f"attention {name}", found="added key and value projections", expected="none")
