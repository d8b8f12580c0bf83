"""Integer products on the CPU: unsigned 8-bit activations times signed 8-bit weights, `torch._int_mm` for every group.

A group's int32 block is converted, scaled and added before the next one is computed, tile by tile, so that it stays in
the cache: the same loop over whole matrices spends most of its time on memory. Tiles are as large as the second-level
cache bears; smaller ones pay for more calls.
"""

import functools

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from papercore.kernels.prepared import rest_factors
from papercore.quant.affine import Parameters, code_range, split_groups

TILE_ROWS, TILE = 256, 256 * 512
"""rows, and elements, of a block of results"""

QUANTISED_AT_ONCE = 2**18
"""values quantised in one go: a handful of elementwise passes over 1 MiB"""


def activation_codes(
    x: Float[Tensor, "m k"], parameters: Parameters, bits: int, group_size: int, symmetric: bool
) -> tuple[UInt8[Tensor, "m k"], Float[Tensor, "m g"]]:
    """Codes as `papercore.quant.quantize` gives them, moved into uint8, and the zero points moved as much.

    The type of a code says nothing about NaN; its scale or zero point carries it.
    """
    smallest, largest = code_range(bits, symmetric)
    zero = parameters.zero - smallest
    rows, columns = x.shape
    codes = torch.empty(rows, columns, dtype=torch.uint8, device=x.device)
    whole = columns % group_size == 0
    step = max(1, QUANTISED_AT_ONCE // max(columns, 1))
    for begin in range(0, rows, step):
        part = slice(begin, min(begin + step, rows))
        groups = split_groups(x[part].float(), group_size)
        q = torch.div(groups, parameters.scale[part, :, None]).round_().add_(zero[part, :, None])
        q = q.clamp_(0, largest - smallest).reshape(len(q), -1)
        codes[part] = q if whole else q[:, :columns]
    return codes, zero


def group_linear_cpu(
    codes: Int[Tensor, "m k"],
    scale: Float[Tensor, "m g"],
    zero: Float[Tensor, "m g"],
    w_codes: Int[Tensor, "n k"],
    w_scale: Float[Tensor, "g n"],
    w_sums: Int[Tensor, "g n"],
    w_rest: Float[Tensor, "g n"] | None,
    bias: Float[Tensor, " n"] | None,
    group_size: int,
) -> Float[Tensor, "m n"]:
    """See `papercore.kernels.operators.group_linear`."""
    (m, k), n, groups = codes.shape, w_codes.shape[0], w_scale.shape[0]
    y = torch.zeros(m, n, dtype=torch.float32) if bias is None else bias.float().repeat(m, 1)
    if w_rest is not None:
        y.addmm_(rest_factors(codes, scale, zero, group_size), w_rest)
    rows = max(1, min(m, TILE_ROWS))
    columns = max(64, TILE // rows // 64 * 64)
    product = integer_product if exact_integers(codes.dtype) else exact_product
    shift = zero.to(torch.int32)
    for n0 in range(0, n, columns):
        ns = slice(n0, min(n0 + columns, n))
        for m0 in range(0, m, rows):
            ms = slice(m0, min(m0 + rows, m))
            block = y[ms, ns]
            integers = torch.empty(block.shape, dtype=torch.int32)
            floats = torch.empty(block.shape, dtype=torch.float32)
            for u in range(groups):
                ks = slice(u * group_size, min((u + 1) * group_size, k))
                product(codes[ms, ks], w_codes[ns, ks].t(), integers)
                integers.addcmul_(shift[ms, u, None], w_sums[u, ns], value=-1)
                floats.copy_(integers)
                block.addcmul_(floats.mul_(scale[ms, u, None]), w_scale[u, ns])
    return y


def integer_product(a: Int[Tensor, "m k"], b: Int[Tensor, "k n"], out: Int[Tensor, "m n"]) -> None:
    torch._int_mm(a, b, out=out)  # pyright: ignore[reportPrivateImportUsage]


def exact_product(a: Int[Tensor, "m k"], b: Int[Tensor, "k n"], out: Int[Tensor, "m n"]) -> None:
    """For processors whose 8-bit product saturates: float64 holds these sums exactly."""
    out.copy_(a.double() @ b.double())


@functools.cache
def exact_integers(dtype: torch.dtype) -> bool:
    """Whether `torch._int_mm` is exact here. Kernels for processors without VNNI add pairs of products in 16 bits."""
    largest = 255 if dtype == torch.uint8 else -128
    a = torch.full((32, 64), largest, dtype=dtype)
    b = torch.full((32, 64), -128, dtype=torch.int8)
    try:
        found = torch._int_mm(a, b.t())  # pyright: ignore[reportPrivateImportUsage]
    except RuntimeError:
        return False
    return bool((found == 64 * largest * -128).all())


def has_fast_integers() -> bool:
    """Whether the processor multiplies 8-bit integers with the instructions that the measurements were made with."""
    return torch.cpu._is_vnni_supported() and exact_integers(torch.uint8)
