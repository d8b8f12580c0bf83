"""Uniform quantisation: choose parameters, quantise, dequantise, fake-quantise with straight-through gradient.

Everything works along the last dimension of length K, cut into G = ceil(K / group_size) groups; the last group may be
shorter. One scale s and one zero point z for every row and group. Other granularities are views:

    per group     group_size = g
    per channel   weight.flatten(1), group_size = None        one row a channel
    per tensor    x.reshape(1, -1), group_size = None

Asymmetric, b bits, Q = 2^b - 1, over the values v of a group with clip ratio r:

    hi = max(0, max v) r,  lo = min(0, min v) r,  s = max(hi - lo, floor) / Q,  z = clip(round(-lo / s), 0, Q)
    q = clip(round(v / s) + z, 0, Q),  v' = (q - z) s

Symmetric, Qs = 2^(b-1) - 1:  s = max(max|v| r, floor) / Qs,  z = 0,  q = clip(round(v / s), -Qs - 1, Qs).

Arithmetic is float32 whatever the input's type. Rounding is to nearest, ties to even, of the true quotient v / s, and
the zero point is added afterwards: another order moves values that lie on a tie by one step. The range always contains
0, so zeros stay exactly zero and a zero point is always a legal code. (Q-DiT, arXiv 2406.17343, section 3; the range
rule differs from its code, which loses groups of one sign.)
"""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from papercore.errors import InputError

FLOOR = 1e-5
"""smallest range of a group; keeps the scale of an all-zero group positive"""

SMALLEST_FLOAT16 = 6e-8
"""scales rounded to float16 are kept above this, so that none becomes zero"""


class Parameters(NamedTuple):
    """Scale and zero point, float32, [..., G]; the zero point holds whole numbers."""

    scale: Tensor
    zero: Tensor


def code_range(bits: int, symmetric: bool) -> tuple[int, int]:
    """The smallest and the largest code."""
    if not isinstance(bits, int) or isinstance(bits, bool) or not 2 <= bits <= 16:
        raise InputError("bits", found=bits, expected="a whole number from 2 to 16")
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)


def resolve_group_size(columns: int, group_size: int | None) -> int:
    """The group size in columns; None and 0 mean the whole row."""
    if group_size is None or group_size == 0:
        return max(columns, 1)
    if not isinstance(group_size, int) or isinstance(group_size, bool) or group_size < 1:
        raise InputError(
            "group size", found=group_size, expected="a whole number of at least 1, or None for whole rows"
        )
    if group_size > columns:
        raise InputError(
            "group size", found=group_size, expected=f"at most the {columns} columns, or None for whole rows"
        )
    return group_size


def split_groups(x: Float[Tensor, "*rows columns"], size: int) -> Float[Tensor, "*rows groups size"]:
    """The groups as a further dimension; a short last group is filled with zeros, which no range rule notices."""
    columns = x.shape[-1]
    groups = -(-columns // size)
    if groups * size != columns:
        x = torch.nn.functional.pad(x, (0, groups * size - columns))
    return x.reshape(*x.shape[:-1], groups, size)


def join_groups(x: Float[Tensor, "*rows groups size"], columns: int) -> Float[Tensor, "*rows columns"]:
    """The inverse of `split_groups`."""
    return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])[..., :columns]


def choose_parameters(
    x: Float[Tensor, "*rows columns"],
    bits: int,
    group_size: int | None = None,
    *,
    symmetric: bool = False,
    clip_ratio: float = 1.0,
    method: Literal["max", "mse"] = "max",
    shrinks: tuple[int, float] = (100, 0.001),
    floor: float = FLOOR,
    scale_dtype: torch.dtype = torch.float32,
) -> Parameters:
    """Scale and zero point of every row and group of `x`.

    Args:
        x: any floating type; [..., K].
        bits: 2 to 16.
        group_size: columns a group; None or 0 for whole rows.
        clip_ratio: r above; below 1 the range is clipped, above 1 it is widened.
        method: "max" takes the whole range. "mse" tries `shrinks` = (n, step): ranges shrunk by 1 - i step for
            i = 0..n-1, and keeps the first with the smallest sum of |v - v'|^2.4 over the group.
        floor: smallest range.
        scale_dtype: float16 rounds the scale to half precision, so that what is stored is what was used.

    Raises:
        InputError: bits, group size, clip ratio or method out of range.
    """
    code_range(bits, symmetric)
    if not 0 < clip_ratio < float("inf"):
        raise InputError("clip ratio", found=clip_ratio, expected="above 0")
    groups = split_groups(x.float(), resolve_group_size(x.shape[-1], group_size))
    if symmetric:
        low, high = groups.new_zeros(groups.shape[:-1]), _extreme(groups.abs(), "max")
    else:
        low, high = _extreme(groups, "min").clamp(max=0), _extreme(groups, "max").clamp(min=0)
    low, high = low * clip_ratio, high * clip_ratio
    if method == "max":
        return parameters_of_range(low, high, bits, symmetric=symmetric, floor=floor, scale_dtype=scale_dtype)
    if method != "mse":
        raise InputError("range method", found=method, expected="max or mse")
    best = torch.full_like(high, torch.inf)
    kept = parameters_of_range(low, high, bits, symmetric=symmetric, floor=floor, scale_dtype=scale_dtype)
    for i in range(shrinks[0]):
        shrink = 1 - shrinks[1] * i
        tried = parameters_of_range(
            low * shrink, high * shrink, bits, symmetric=symmetric, floor=floor, scale_dtype=scale_dtype
        )
        codes = _to_codes(groups, tried, *code_range(bits, symmetric))
        error = (groups - _from_codes(codes, tried)).abs().pow(2.4).sum(-1)
        better = error < best
        best = torch.where(better, error, best)
        kept = Parameters(*(torch.where(better, new, old) for new, old in zip(tried, kept, strict=True)))
    return kept


def parameters_of_range(
    low: Tensor,
    high: Tensor,
    bits: int,
    *,
    symmetric: bool = False,
    floor: float = FLOOR,
    scale_dtype: torch.dtype = torch.float32,
) -> Parameters:
    """Scale and zero point for known ranges `low` <= 0 <= `high` (symmetric: -high..high)."""
    smallest, largest = code_range(bits, symmetric)
    steps = largest if symmetric else largest - smallest
    scale = ((high if symmetric else high - low).clamp(min=floor)) / steps
    if scale_dtype == torch.float16:
        scale = scale.clamp(min=SMALLEST_FLOAT16).half().float()
        if scale.isinf().any() and torch.isfinite(high).all():
            raise InputError(
                "scale", found="numbers above 65504", expected="float16 numbers", hint="use float32 scales"
            )
    zero = torch.zeros_like(scale) if symmetric else (-low / scale).round().clamp(smallest, largest)
    return Parameters(scale, zero)


def quantize(
    x: Float[Tensor, "*rows columns"],
    parameters: Parameters,
    bits: int,
    group_size: int | None = None,
    *,
    symmetric: bool = False,
) -> Int[Tensor, "*rows columns"]:
    """Codes of `x` under given parameters, int16 (int32 above 15 bits)."""
    groups = split_groups(x.float(), resolve_group_size(x.shape[-1], group_size))
    codes = _to_codes(groups, parameters, *code_range(bits, symmetric))
    return join_groups(codes, x.shape[-1]).to(torch.int16 if bits < 16 else torch.int32)


def dequantize(
    codes: Int[Tensor, "*rows columns"], parameters: Parameters, group_size: int | None = None
) -> Float[Tensor, "*rows columns"]:
    """(q - z) s, float32."""
    groups = split_groups(codes.float(), resolve_group_size(codes.shape[-1], group_size))
    return join_groups(_from_codes(groups, parameters), codes.shape[-1])


def group_quantize(
    x: Float[Tensor, "*rows columns"],
    bits: int,
    group_size: int | None,
    *,
    symmetric: bool = False,
    clip_ratio: float = 1.0,
    method: Literal["max", "mse"] = "max",
    scale_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """(codes [..., K] integer, scale [..., G] float32, zero [..., G] float32) of `x`; see `choose_parameters`."""
    parameters = choose_parameters(
        x, bits, group_size, symmetric=symmetric, clip_ratio=clip_ratio, method=method, scale_dtype=scale_dtype
    )
    return quantize(x, parameters, bits, group_size, symmetric=symmetric), parameters.scale, parameters.zero


def group_dequantize(
    codes: Int[Tensor, "*rows columns"], scale: Tensor, zero: Tensor, group_size: int | None
) -> Float[Tensor, "*rows columns"]:
    """The values of `group_quantize`'s result, float32."""
    return dequantize(codes, Parameters(scale.float(), zero.float()), group_size)


def fake_quantize(
    x: Float[Tensor, "*rows columns"],
    bits: int,
    group_size: int | None,
    *,
    symmetric: bool = False,
    clip_ratio: float = 1.0,
    method: Literal["max", "mse"] = "max",
) -> Float[Tensor, "*rows columns"]:
    """`x` quantised and dequantised with parameters of its own values; same shape and type.

    The gradient is passed straight through where a value lies inside the code range and is 0 where it is clipped.
    """
    with torch.no_grad():
        parameters = choose_parameters(x, bits, group_size, symmetric=symmetric, clip_ratio=clip_ratio, method=method)
    return fake_quantize_with(x, parameters, bits, group_size, symmetric=symmetric)


def fake_quantize_with(
    x: Float[Tensor, "*rows columns"],
    parameters: Parameters,
    bits: int,
    group_size: int | None = None,
    *,
    symmetric: bool = False,
) -> Float[Tensor, "*rows columns"]:
    """`x` quantised and dequantised with given parameters; same shape and type.

    Gradients, with q the code: to x as in `fake_quantize`; to the scale round(v/s) - v/s inside the code range and
    q - z where clipped (learned step size; arXiv 1902.08153, section 2.1).
    """
    groups = split_groups(x.float(), resolve_group_size(x.shape[-1], group_size))
    smallest, largest = code_range(bits, symmetric)
    scale, zero = parameters.scale[..., None], parameters.zero[..., None]
    ratio = groups / scale
    rounded: Tensor = StraightThroughRound.apply(ratio)  # pyright: ignore[reportAssignmentType]
    codes = (rounded + zero).clamp(smallest, largest)
    values = join_groups((codes - zero) * scale, x.shape[-1])
    if x.dtype == torch.float16:  # the last code may lie half a step beyond the largest number
        limit = torch.finfo(x.dtype).max
        values = values.clamp(-limit, limit)
    return values.to(x.dtype)


class StraightThroughRound(torch.autograd.Function):
    """round(x), ties to even, with the gradient of the identity."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> Tensor:
        return gradients[0]


def _extreme(groups: Tensor, which: Literal["min", "max"]) -> Tensor:
    if groups.shape[-1] == 0 or groups.numel() == 0:
        return groups.new_zeros(groups.shape[:-1])
    return groups.amin(-1) if which == "min" else groups.amax(-1)


def _to_codes(groups: Tensor, parameters: Parameters, smallest: int, largest: int) -> Tensor:
    return ((groups / parameters.scale[..., None]).round() + parameters.zero[..., None]).clamp(smallest, largest)


def _from_codes(codes: Tensor, parameters: Parameters) -> Tensor:
    return (codes - parameters.zero[..., None]) * parameters.scale[..., None]
