"""The quantised linear layer, and the attention that reads queries, keys and values from one of them.

How a layer computes: "simulate" multiplies dequantised values; "integer" multiplies codes; "auto" does what the
recorded measurement says is faster (`integer_wins`; docs/decisions/0005).
"""

import dataclasses
from typing import Any, Literal

import torch
from jaxtyping import Float
from papercore.errors import InputError
from papercore.kernels import PreparedWeight, group_linear, has_fast_integers, prepare_weight, quantize_rows
from papercore.quant import (
    Parameters,
    choose_parameters,
    fake_quantize_with,
    group_dequantize,
    pack_codes,
    quantize,
    unpack_codes,
)
from papercore.quant.affine import parameters_of_range, split_groups
from torch import Tensor, nn
from torch.nn import functional

from qdit.config import QDiTConfig

Backend = Literal["auto", "simulate", "integer"]


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """How one layer is quantised; see `QDiTConfig` for the fields."""

    wbits: int
    abits: int
    group_size: int
    """columns a group, at most the columns of the layer"""
    w_sym: bool
    a_sym: bool
    act: str
    act_granularity: str
    scale_dtype: str

    @classmethod
    def of(cls, config: QDiTConfig, group_size: int, granularity: str) -> "LayerSpec":
        act = "none" if config.abits == 16 else config.act
        return cls(
            config.wbits, config.abits, group_size, config.w_sym, config.a_sym, act, granularity, config.scale_dtype
        )

    @property
    def torch_scale_dtype(self) -> torch.dtype:
        return torch.float16 if self.scale_dtype == "float16" else torch.float32


class QuantLinear(nn.Module):
    """y = Q_a(x) Q_w(W)^T + b for W [N, K] in groups of columns.

    Stored are packed codes, scales and zero points, all as integers: loaders that cast floating tensors to another
    type would otherwise change the scales. Back ends: "simulate" multiplies dequantised values; "integer" multiplies
    codes and rescales group by group, which equals the simulation up to the order of summation.

    Args:
        rows, columns: N and K.
        bias: whether there is one.
        spec: how to quantise.
        name: of the layer in the model, for messages.
    """

    def __init__(self, rows: int, columns: int, *, bias: bool, spec: LayerSpec, name: str = "") -> None:
        super().__init__()
        self.rows, self.columns, self.spec, self.name = rows, columns, spec, name
        self.backend: Backend = "simulate"
        self.check_finite = False
        self._cached: tuple[torch.device, torch.dtype, Tensor] | None = None
        self._prepared: tuple[torch.device, PreparedWeight] | None = None
        groups = -(-columns // spec.group_size)
        integer = torch.int16 if spec.scale_dtype == "float16" else torch.int32
        if spec.wbits == 16:
            self.weight = nn.Parameter(torch.empty(rows, columns), requires_grad=False)
        else:
            self.register_buffer("qweight", torch.zeros(rows, -(-columns * spec.wbits // 8), dtype=torch.uint8))
            self.register_buffer("scale", torch.zeros(rows, groups, dtype=integer))
            if not spec.w_sym:
                self.register_buffer("zero", torch.zeros(rows, groups, dtype=torch.uint8))
        if spec.act == "static":
            self.register_buffer("act_scale", torch.zeros(groups, dtype=torch.int32))
            self.register_buffer("act_zero", torch.zeros(groups, dtype=torch.uint8))
        self.bias = nn.Parameter(torch.zeros(rows), requires_grad=False) if bias else None

    # ---- weights

    def set_weight(self, codes: Tensor, parameters: Parameters) -> None:
        """Stores codes [N, K] with scale and zero point [N, G]; the scale must be exact in the layer's scale type."""
        self.qweight = pack_codes(codes, self.spec.wbits)
        self.scale = _to_bits(parameters.scale, self.spec.torch_scale_dtype)
        if not self.spec.w_sym:
            self.zero = parameters.zero.to(torch.uint8)
        self.forget()

    def round_to_nearest(self, weight: Float[Tensor, "rows columns"]) -> None:
        """Quantises `weight` by rounding; keeps it as it is when the layer has 16-bit weights."""
        if self.spec.wbits == 16:
            self.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
            return
        spec = self.spec
        parameters = choose_parameters(
            weight, spec.wbits, spec.group_size, symmetric=spec.w_sym, scale_dtype=spec.torch_scale_dtype
        )
        self.set_weight(quantize(weight, parameters, spec.wbits, spec.group_size, symmetric=spec.w_sym), parameters)

    def codes(self) -> tuple[Tensor, Tensor, Tensor]:
        """Codes [N, K] int16, scale and zero point [N, G] float32."""
        codes = unpack_codes(self.qweight, self.spec.wbits, self.columns, signed=self.spec.w_sym)
        scale = scale_values(self.scale)
        return codes, scale, torch.zeros_like(scale) if self.spec.w_sym else self.zero.float()

    def dequantized(self) -> Float[Tensor, "rows columns"]:
        """The weight that the layer computes with, float32."""
        if self.spec.wbits == 16:
            return self.weight
        return group_dequantize(*self.codes(), self.spec.group_size)

    def prepared(self, device: torch.device) -> PreparedWeight:
        """The weight laid out for integer products; made at the first use, and never saved or copied."""
        if self._prepared is None or self._prepared[0] != device:
            codes, scale, zero = (value.to(device) for value in self.codes())
            self._prepared = (device, prepare_weight(codes, scale, zero, self.spec.group_size))
        return self._prepared[1]

    def forget(self) -> None:
        """Drops what was derived from the weight; to be called when its buffers were changed in place."""
        self._cached = self._prepared = None

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:
        super()._load_from_state_dict(*arguments, **options)
        self.forget()

    # ---- activations

    def set_static_range(self, parameters: Parameters) -> None:
        """Scale and zero point of every group, [G]."""
        self.act_scale = _to_bits(parameters.scale, torch.float32)
        self.act_zero = parameters.zero.to(torch.uint8)

    def activation_parameters(self, x: Float[Tensor, "*rows columns"]) -> Parameters:
        """Scale and zero point of every token and group, [..., G]."""
        spec = self.spec
        if spec.act == "static":
            scale, zero = scale_values(self.act_scale), self.act_zero.float()
            return Parameters(scale.expand(*x.shape[:-1], -1), zero.expand(*x.shape[:-1], -1))
        if spec.act_granularity == "token" or x.numel() == 0:
            return choose_parameters(x, spec.abits, spec.group_size, symmetric=spec.a_sym)
        groups = split_groups(x.detach().float(), spec.group_size)
        if spec.a_sym:
            low, high = torch.zeros_like(groups[..., 0]), groups.abs().amax(-1)
        else:
            low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        shared = tuple(range(0 if spec.act_granularity == "tensor" or x.ndim < 3 else 1, x.ndim - 1))
        if spec.act_granularity == "sample" and x.ndim < 3:
            shared = ()  # rows without a token dimension are samples themselves
        if shared:
            low, high = low.amin(shared, keepdim=True), high.amax(shared, keepdim=True)
        chosen = parameters_of_range(low, high, spec.abits, symmetric=spec.a_sym)
        return Parameters(*(value.expand(*x.shape[:-1], value.shape[-1]) for value in chosen))

    def quantized_input(self, x: Float[Tensor, "*rows columns"]) -> Float[Tensor, "*rows columns"]:
        """What the weight is multiplied with: `x` quantised and dequantised."""
        spec = self.spec
        if spec.act == "none":
            return x
        parameters = self.activation_parameters(x)
        return fake_quantize_with(x, parameters, spec.abits, spec.group_size, symmetric=spec.a_sym)

    # ---- product

    def forward(self, x: Float[Tensor, "*rows columns"]) -> Float[Tensor, "*rows out"]:
        if self.check_finite:
            require_finite(x, self.name)
        if self._takes_integers(x):
            return self._integer(x)
        cached = self._cached
        if cached is None or cached[0] != x.device or cached[1] != x.dtype:
            cached = self._cached = (x.device, x.dtype, self.dequantized().to(x.device, x.dtype))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return functional.linear(self.quantized_input(x), cached[2], bias)

    def _takes_integers(self, x: Tensor) -> bool:
        if self.backend == "simulate" or self.spec.act == "none" or self.spec.wbits == 16:
            return False
        if self.backend == "integer":
            return True
        return integer_wins(x, self.rows, self.columns, self.spec.group_size)

    def _integer(self, x: Tensor) -> Tensor:
        spec = self.spec
        flat = x.reshape(-1, self.columns)
        parameters = None
        if spec.act == "static" or spec.act_granularity != "token":
            chosen = self.activation_parameters(x)
            parameters = Parameters(*(value.reshape(len(flat), value.shape[-1]) for value in chosen))
        rows = quantize_rows(flat, spec.abits, spec.group_size, symmetric=spec.a_sym, parameters=parameters)
        y = group_linear(rows, self.prepared(x.device), self.bias)
        if spec.act == "static":  # known ranges would turn what is not a number into some code
            y = y.masked_fill(flat.isnan().any(-1, keepdim=True), torch.nan)
        return y.reshape(*x.shape[:-1], self.rows).to(x.dtype)

    def extra_repr(self) -> str:
        s = self.spec
        return (
            f"{self.columns} -> {self.rows}, W{s.wbits}A{s.abits if s.act != 'none' else 16}, groups of {s.group_size}"
        )

    def __getstate__(self) -> dict[str, Any]:
        """What is copied: everything but the caches."""
        return {**self.__dict__, "_cached": None, "_prepared": None}


def require_finite(x: Tensor, name: str) -> None:
    """Raises InputError with the layer's name when an input is not finite; the host waits for the device here."""
    bad = x.numel() - int(torch.isfinite(x).sum())
    if bad:
        hint = "float16 ends at 65504: use bfloat16 or float32" if x.dtype == torch.float16 else None
        raise InputError(
            f"input of layer {name}", found=f"{bad} values that are not finite", expected="finite ones", hint=hint
        )


def integer_wins(x: Tensor, rows: int, columns: int, group_size: int) -> bool:
    """Whether integer products of `x` were faster than the simulation wherever this was measured.

    float32 on a CPU with 8-bit dot products: from groups of 64, 64 tokens and half a million weights on. Smaller
    layers, fewer tokens and smaller groups lose to the calls they need; nothing was measured on a GPU. The tables are
    in docs/decisions/0005.
    """
    large = rows * columns >= 2**19 and x.numel() >= 64 * columns and group_size >= 64
    return large and x.device.type == "cpu" and x.dtype == torch.float32 and has_fast_integers()


class FusedSelfAttention:
    """diffusers' attention processor for a module whose queries, keys and values come from one layer `qkv`.

    The input is quantised once and multiplied once; rows of the layer are q, k, v.
    """

    def __call__(self, attn: nn.Module, hidden_states: Tensor, *_: object, **__: object) -> Tensor:
        batch, tokens, _ = hidden_states.shape
        heads: int = attn.heads  # pyright: ignore[reportAssignmentType]
        q, k, v = (
            part.reshape(batch, tokens, heads, -1).transpose(1, 2)
            for part in attn.qkv(hidden_states).chunk(3, -1)  # pyright: ignore[reportCallIssue]
        )
        x = functional.scaled_dot_product_attention(q, k, v, scale=attn.scale)  # pyright: ignore[reportArgumentType]
        x = x.transpose(1, 2).reshape(batch, tokens, -1)
        return attn.to_out[1](attn.to_out[0](x))  # pyright: ignore[reportIndexIssue]


def _to_bits(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The bits of float16 or float32 numbers as int16 or int32."""
    stored = scale.to(dtype)
    if not torch.equal(stored.float(), scale.float()):
        raise InputError("scale", found="numbers that are not exact in the stored type", expected=f"{dtype} numbers")
    return stored.view(torch.int16 if dtype == torch.float16 else torch.int32)


def scale_values(bits: Tensor) -> Tensor:
    """Stored scales, int16 or int32, as the float16 or float32 numbers whose bits they are; float32."""
    return bits.view(torch.float16 if bits.dtype == torch.int16 else torch.float32).float()
