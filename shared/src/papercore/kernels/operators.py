"""The operators as torch knows them, so that `torch.compile` and `torch.export` see one node each.

    papercore::quantize_groups     activations -> codes, scale, zero point, with ranges of every token and group
    papercore::quantize_with       activations -> codes, zero point, with given parameters
    papercore::group_linear        codes x prepared weight -> float32
    papercore::group_linear_packed codes x packed weight -> float32

Codes are uint8 on the CPU and int8 on a GPU, whose matrix units want both operands of one type; zero points are moved
with them, so that scale (code - zero) is the same number. On a GPU the Triton kernels run, imported at the first call.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from papercore.errors import InputError
from papercore.kernels.cpu import activation_codes, group_linear_cpu
from papercore.kernels.prepared import PackedWeight, PreparedWeight, unpack_rows
from papercore.quant.affine import Parameters, choose_parameters, code_range, resolve_group_size


class QuantizedRows(NamedTuple):
    """Activations [M, K] as codes, with scale and zero point [M, G]."""

    codes: Tensor
    scale: Tensor
    zero: Tensor


def quantize_rows(
    x: Float[Tensor, "m k"],
    bits: int,
    group_size: int | None,
    *,
    symmetric: bool = False,
    parameters: Parameters | None = None,
) -> QuantizedRows:
    """The codes of `papercore.quant`, moved to the 8-bit type that the device's product wants.

    Args:
        bits: 2 to 8.
        parameters: scale and zero point [M, G]; None computes them of every token and group.

    Raises:
        InputError: more than 8 bits, or shapes that do not fit.
    """
    if code_range(bits, symmetric)[1] > 255:
        raise InputError("bits", found=bits, expected="a whole number from 2 to 8")
    if x.ndim != 2:
        raise InputError("x", found=f"shape {tuple(x.shape)}", expected="two dimensions")
    size = resolve_group_size(x.shape[1], group_size)
    if parameters is None:
        return QuantizedRows(*torch.ops.papercore.quantize_groups(x, bits, size, symmetric))
    expected = (x.shape[0], -(-x.shape[1] // size))
    for name, value in zip(("scale", "zero"), parameters, strict=True):
        if value.shape != expected:
            raise InputError(name, found=f"shape {tuple(value.shape)}", expected=str(expected))
    scale, zero = parameters
    codes, moved = torch.ops.papercore.quantize_with(x, scale, zero, bits, size, symmetric)
    # Codes cannot hold NaN; with ranges of its own a token's scale does, with given ones it is put there.
    broken = x.isnan().any(1, keepdim=True)
    return QuantizedRows(codes, scale.masked_fill(broken, torch.nan), moved)


def group_linear(
    x: QuantizedRows, weight: PreparedWeight | PackedWeight, bias: Float[Tensor, " n"] | None = None
) -> Float[Tensor, "m n"]:
    """The product of `papercore.kernels.group_gemm` with a prepared or packed weight, float32 [M, N].

    Raises:
        InputError: shapes, types or devices that do not fit.
    """
    rows, columns = x.codes.shape
    groups = weight.scale.shape[0]
    if columns != weight.shape[1]:
        raise InputError("x", found=f"{columns} columns", expected=f"{weight.shape[1]} as in the weight")
    if x.codes.dtype not in (torch.uint8, torch.int8):
        raise InputError("x", found=f"{x.codes.dtype} codes", expected="uint8 or int8")
    if x.codes.device != weight.scale.device:
        raise InputError("x", found=f"on {x.codes.device}", expected=f"on {weight.scale.device} as the weight")
    for name, value in (("scale", x.scale), ("zero", x.zero)):
        if value.shape != (rows, groups):
            raise InputError(name, found=f"shape {tuple(value.shape)}", expected=f"({rows}, {groups})")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise InputError("bias", found=f"shape {tuple(bias.shape)}", expected=f"({weight.shape[0]},)")
    rest = (weight.scale, weight.sums, weight.rest, bias, weight.group_size)
    if isinstance(weight, PackedWeight):
        return torch.ops.papercore.group_linear_packed(*x, weight.packed, *rest, weight.tile)
    return torch.ops.papercore.group_linear(*x, weight.codes, *rest)


# ---- registration; schemas are written out because the shapes in our annotations are no types that torch knows


@torch.library.custom_op(
    "papercore::quantize_groups",
    mutates_args=(),
    schema="(Tensor x, int bits, int group_size, bool symmetric) -> (Tensor, Tensor, Tensor)",
)
def _quantize_groups(x: Tensor, bits: int, group_size: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    parameters = choose_parameters(x, bits, group_size, symmetric=symmetric)
    codes, zero = activation_codes(x, parameters, bits, group_size, symmetric)
    return codes, parameters.scale, zero


@_quantize_groups.register_kernel("cuda")
def _(x: Tensor, bits: int, group_size: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    from papercore.kernels import triton_kernels

    return triton_kernels.quantize_groups(x, bits, group_size, symmetric)


@_quantize_groups.register_fake
def _(x: Tensor, bits: int, group_size: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = x.shape
    scale = x.new_empty(rows, -(-columns // group_size), dtype=torch.float32)
    return x.new_empty(rows, columns, dtype=code_type(x.device)), scale, torch.empty_like(scale)


@torch.library.custom_op(
    "papercore::quantize_with",
    mutates_args=(),
    schema="(Tensor x, Tensor scale, Tensor zero, int bits, int group_size, bool symmetric) -> (Tensor, Tensor)",
)
def _quantize_with(
    x: Tensor, scale: Tensor, zero: Tensor, bits: int, group_size: int, symmetric: bool
) -> tuple[Tensor, Tensor]:
    return activation_codes(x, Parameters(scale, zero), bits, group_size, symmetric)


@_quantize_with.register_kernel("cuda")
def _(x: Tensor, scale: Tensor, zero: Tensor, bits: int, group_size: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    codes, moved = activation_codes(x, Parameters(scale, zero), bits, group_size, symmetric)
    return (codes.to(torch.int16) - 128).to(torch.int8), moved - 128


@_quantize_with.register_fake
def _(x: Tensor, scale: Tensor, zero: Tensor, bits: int, group_size: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=code_type(x.device)), scale.new_empty(scale.shape)


@torch.library.custom_op(
    "papercore::group_linear",
    mutates_args=(),
    schema="(Tensor codes, Tensor scale, Tensor zero, Tensor w_codes, Tensor w_scale, Tensor w_sums, "
    "Tensor? w_rest, Tensor? bias, int group_size) -> Tensor",
)
def _group_linear(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    w_codes: Tensor,
    w_scale: Tensor,
    w_sums: Tensor,
    w_rest: Tensor | None,
    bias: Tensor | None,
    group_size: int,
) -> Tensor:
    return group_linear_cpu(codes, scale, zero, w_codes, w_scale, w_sums, w_rest, bias, group_size)


@_group_linear.register_kernel("cuda")
def _(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    w_codes: Tensor,
    w_scale: Tensor,
    w_sums: Tensor,
    w_rest: Tensor | None,
    bias: Tensor | None,
    group_size: int,
) -> Tensor:
    from papercore.kernels import triton_kernels

    return triton_kernels.group_linear(codes, scale, zero, w_codes, w_scale, w_sums, w_rest, bias, group_size)


@_group_linear.register_fake
def _(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    w_codes: Tensor,
    w_scale: Tensor,
    w_sums: Tensor,
    w_rest: Tensor | None,
    bias: Tensor | None,
    group_size: int,
) -> Tensor:
    return scale.new_empty(codes.shape[0], w_codes.shape[0], dtype=torch.float32)


@torch.library.custom_op(
    "papercore::group_linear_packed",
    mutates_args=(),
    schema="(Tensor codes, Tensor scale, Tensor zero, Tensor w_packed, Tensor w_scale, Tensor w_sums, "
    "Tensor? w_rest, Tensor? bias, int group_size, int tile) -> Tensor",
)
def _group_linear_packed(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    w_packed: Tensor,
    w_scale: Tensor,
    w_sums: Tensor,
    w_rest: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    tile: int,
) -> Tensor:
    y = torch.empty(codes.shape[0], w_scale.shape[1], dtype=torch.float32)
    together = max(1, 512 // tile) * tile
    for n in range(0, w_scale.shape[1], together):
        ns = slice(n, min(n + together, w_scale.shape[1]))
        rows = unpack_rows(w_packed[n // 2 : (n + together) // 2], tile)[: ns.stop - n]
        rest = None if w_rest is None else w_rest[:, ns]
        part = None if bias is None else bias[ns]
        y[:, ns] = group_linear_cpu(codes, scale, zero, rows, w_scale[:, ns], w_sums[:, ns], rest, part, group_size)
    return y


@_group_linear_packed.register_kernel("cuda")
def _(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    w_packed: Tensor,
    w_scale: Tensor,
    w_sums: Tensor,
    w_rest: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    tile: int,
) -> Tensor:
    from papercore.kernels import triton_kernels

    return triton_kernels.group_linear_packed(
        codes, scale, zero, w_packed, w_scale, w_sums, w_rest, bias, group_size, tile
    )


@_group_linear_packed.register_fake
def _(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    w_packed: Tensor,
    w_scale: Tensor,
    w_sums: Tensor,
    w_rest: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    tile: int,
) -> Tensor:
    return scale.new_empty(codes.shape[0], w_scale.shape[1], dtype=torch.float32)


def code_type(device: torch.device) -> torch.dtype:
    return torch.int8 if device.type == "cuda" else torch.uint8


def as_int8(codes: Int[Tensor, "m k"], zero: Tensor) -> tuple[Tensor, Tensor]:
    """Unsigned codes and their zero points moved into int8."""
    if codes.dtype == torch.int8:
        return codes, zero
    return (codes.to(torch.int16) - 128).to(torch.int8), zero - 128
