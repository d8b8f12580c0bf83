"""The same products on a GPU: 8-bit codes on the matrix units, sums rescaled in registers at the end of every group.

Imported only when a CUDA tensor arrives, or by a test under Triton's interpreter (TRITON_INTERPRET=1). One loop runs
over all pieces of all groups, so that loads of the next group overlap the rescaling of this one; with a single group
there is nothing to rescale inside the loop. Pieces that reach over a group's end read zeros. Nothing was tuned on a
GPU yet: tiles follow the usual sizes.
"""

# pyright: reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false
# Triton compiles this text itself; to Python its blocks and constants have other types.
import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int8, UInt8
from torch import Tensor

from papercore.kernels.prepared import rest_factors
from papercore.quant.affine import FLOOR, code_range

ROUND = tl.constexpr(12582912.0)
"""1.5 2^23: adding and subtracting it rounds to nearest, ties to even, below 2^22"""

Tile = tuple[int, int]


@triton.jit
def _quantize_kernel(
    x, codes, scales, zeros, rows, columns, size, groups, steps, smallest, floor,
    SYMMETRIC: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    u = tl.program_id(1)
    inner = tl.arange(0, WIDTH)
    k = u * size + inner
    here = (r < rows)[:, None] & ((inner < size) & (k < columns))[None, :]
    v = tl.load(x + r[:, None] * columns + k[None, :], mask=here, other=0.0).to(tl.float32)
    broken = tl.max((v != v).to(tl.int32), 1) > 0  # the extremes below ignore NaN
    if SYMMETRIC:
        reach = tl.max(tl.abs(v), 1)
    else:
        low = tl.minimum(tl.min(v, 1), 0.0)
        reach = tl.maximum(tl.max(v, 1), 0.0) - low
    scale = tl.div_rn(tl.maximum(reach, floor), tl.zeros_like(reach) + steps)
    if SYMMETRIC:
        zero = tl.zeros_like(scale)
    else:
        zero = tl.minimum(tl.maximum((tl.div_rn(-low, scale) + ROUND) - ROUND, 0.0), steps)
    scale = tl.where(broken, float("nan"), scale)
    zero = zero - smallest  # of uint8 codes
    divisor = tl.where(broken, 1.0, scale)
    q = (tl.div_rn(v, tl.zeros_like(v) + divisor[:, None]) + ROUND) - ROUND + zero[:, None]
    last = steps * 2 + 1 if SYMMETRIC else steps
    q = tl.minimum(tl.maximum(q, 0.0), last) - 128.0
    tl.store(codes + r[:, None] * columns + k[None, :], q.to(tl.int8), mask=here)
    tl.store(scales + r * groups + u, scale, mask=r < rows)
    tl.store(zeros + r * groups + u, zero - 128.0, mask=r < rows)


@triton.jit
def _rescaled(part, m, n, u, scale, zero, w_scale, w_sums, accumulators, M, N, groups, STORE: tl.constexpr):
    """A finished group's sums [m, n], which index as [rows, 1] and [1, columns] or the other way round."""
    s = tl.load(scale + m * groups + u, mask=m < M, other=0.0)
    z = tl.load(zero + m * groups + u, mask=m < M, other=0.0).to(tl.int32)
    t = tl.load(w_scale + u * N + n, mask=n < N, other=0.0)
    part -= z * tl.load(w_sums + u * N + n, mask=n < N, other=0)
    if STORE:
        tl.store(accumulators + (u * M + m) * N + n, part, mask=(m < M) & (n < N))
    return part.to(tl.float32) * (s * t)


@triton.jit
def _finished(total, m, n, factors, w_rest, bias, M, N, groups, REST: tl.constexpr, BIAS: tl.constexpr):
    if REST:
        for u in range(0, groups):
            f = tl.load(factors + m * groups + u, mask=m < M, other=0.0)
            total += f * tl.load(w_rest + u * N + n, mask=n < N, other=0.0)
    if BIAS:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    return total


@triton.jit
def _linear_kernel(
    x, w, scale, zero, w_scale, w_sums, factors, w_rest, bias, y, accumulators, M, N, K, size, groups,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STEPS: tl.constexpr, ONE: tl.constexpr,
    REST: tl.constexpr, BIAS: tl.constexpr, STORE: tl.constexpr,
):  # fmt: skip
    m = (tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM))[:, None]
    n = (tl.program_id(1).to(tl.int64) * BN + tl.arange(0, BN))[None, :]
    total = tl.zeros((BM, BN), tl.float32)
    part = tl.zeros((BM, BN), tl.int32)
    for i in range(0, groups * STEPS):
        inner = (i % STEPS) * BK + tl.arange(0, BK)
        k = (i // STEPS) * size + inner
        here = (inner < size) & (k < K)
        a = tl.load(x + m * K + k[None, :], mask=(m < M) & here[None, :], other=0)
        b = tl.load(w + n * K + k[:, None], mask=(n < N) & here[:, None], other=0)
        part = tl.dot(a, b, part, out_dtype=tl.int32)
        if not ONE:  # noqa: SIM102 - the outer condition is known to the compiler
            if (i + 1) % STEPS == 0:
                total += _rescaled(
                    part, m, n, i // STEPS, scale, zero, w_scale, w_sums, accumulators, M, N, groups, STORE
                )
                part = tl.zeros((BM, BN), tl.int32)
    if ONE:
        total = _rescaled(part, m, n, 0, scale, zero, w_scale, w_sums, accumulators, M, N, groups, STORE)
    total = _finished(total, m, n, factors, w_rest, bias, M, N, groups, REST, BIAS)
    tl.store(y + m * N + n, total.to(y.dtype.element_ty), mask=(m < M) & (n < N))


@triton.jit
def _packed_kernel(
    x, w, scale, zero, w_scale, w_sums, factors, w_rest, bias, y, M, N, K, size, groups,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STEPS: tl.constexpr,
    REST: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """The weight is the left operand, which the matrix units can take from registers, where it is unpacked."""
    m = (tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM))[None, :]
    byte = (tl.program_id(1).to(tl.int64) * (BN // 2) + tl.arange(0, BN // 2))[:, None]
    low = (tl.program_id(1).to(tl.int64) * BN + tl.arange(0, BN // 2))[:, None]
    high = low + BN // 2
    total_low = tl.zeros((BN // 2, BM), tl.float32)
    total_high = tl.zeros((BN // 2, BM), tl.float32)
    part_low = tl.zeros((BN // 2, BM), tl.int32)
    part_high = tl.zeros((BN // 2, BM), tl.int32)
    for i in range(0, groups * STEPS):
        inner = (i % STEPS) * BK + tl.arange(0, BK)
        k = (i // STEPS) * size + inner
        here = (inner < size) & (k < K)
        a = tl.load(x + m * K + k[:, None], mask=(m < M) & here[:, None], other=0)
        both = tl.load(w + byte * K + k[None, :], mask=here[None, :], other=0)
        part_low = tl.dot((both << 4) >> 4, a, part_low, out_dtype=tl.int32)
        part_high = tl.dot(both >> 4, a, part_high, out_dtype=tl.int32)
        if (i + 1) % STEPS == 0:
            u = i // STEPS
            total_low += _rescaled(part_low, m, low, u, scale, zero, w_scale, w_sums, y, M, N, groups, False)
            total_high += _rescaled(part_high, m, high, u, scale, zero, w_scale, w_sums, y, M, N, groups, False)
            part_low = tl.zeros((BN // 2, BM), tl.int32)
            part_high = tl.zeros((BN // 2, BM), tl.int32)
    total_low = _finished(total_low, m, low, factors, w_rest, bias, M, N, groups, REST, BIAS)
    total_high = _finished(total_high, m, high, factors, w_rest, bias, M, N, groups, REST, BIAS)
    tl.store(y + m * N + low, total_low.to(y.dtype.element_ty), mask=(m < M) & (low < N))
    tl.store(y + m * N + high, total_high.to(y.dtype.element_ty), mask=(m < M) & (high < N))


def quantize_groups(
    x: Float[Tensor, "m k"], bits: int, group_size: int, symmetric: bool
) -> tuple[Int8[Tensor, "m k"], Float[Tensor, "m g"], Float[Tensor, "m g"]]:
    """Codes less 128, scale, zero point less 128, with ranges of every token and group, in one pass over `x`."""
    x = x.contiguous()
    (rows, columns), groups = x.shape, -(-x.shape[1] // group_size)
    smallest, largest = code_range(bits, symmetric)
    codes = torch.empty(rows, columns, dtype=torch.int8, device=x.device)
    scale = torch.empty(rows, groups, dtype=torch.float32, device=x.device)
    zero = torch.empty_like(scale)
    width = max(16, triton.next_power_of_2(group_size))
    together = max(1, min(triton.next_power_of_2(max(rows, 1)), 4096 // width))
    if codes.numel():
        _quantize_kernel[(triton.cdiv(rows, together), groups)](
            x, codes, scale, zero, rows, columns, group_size, groups, float(largest), float(smallest), FLOOR,
            SYMMETRIC=symmetric, ROWS=together, WIDTH=width,
        )  # fmt: skip
    return codes, scale, zero


def group_linear(
    codes: Int8[Tensor, "m k"],
    scale: Float[Tensor, "m g"],
    zero: Float[Tensor, "m g"],
    w_codes: Int8[Tensor, "n k"],
    w_scale: Float[Tensor, "g n"],
    w_sums: Tensor,
    w_rest: Float[Tensor, "g n"] | None,
    bias: Tensor | None,
    group_size: int,
    *,
    tile: Tile | None = None,
    accumulators: Tensor | None = None,
) -> Float[Tensor, "m n"]:
    """See `papercore.kernels.operators.group_linear`.

    Args:
        tile: rows and columns of a block of results, powers of two of at least 16.
        accumulators: int32 [G, M, N] that receives every group's sum (qx - zx) w'.
    """
    (m, k), n, groups = codes.shape, w_codes.shape[0], w_scale.shape[0]
    y = torch.empty(m, n, dtype=torch.float32, device=codes.device)
    if not y.numel():
        return y
    factors = None if w_rest is None else rest_factors(codes, scale, zero, group_size)
    bm, bn = tile or (_rows(m), 128)
    piece = _piece(group_size)
    _linear_kernel[(triton.cdiv(m, bm), triton.cdiv(n, bn))](
        codes.contiguous(), w_codes, scale.contiguous(), zero.contiguous(), w_scale, w_sums, factors, w_rest, bias,
        y, y if accumulators is None else accumulators, m, n, k, group_size, groups,
        BM=bm, BN=bn, BK=piece, STEPS=triton.cdiv(group_size, piece), ONE=groups == 1,
        REST=w_rest is not None, BIAS=bias is not None, STORE=accumulators is not None,
        num_warps=8 if bm * bn >= 128 * 128 else 4, num_stages=3,
    )  # fmt: skip
    return y


def group_linear_packed(
    codes: Int8[Tensor, "m k"],
    scale: Float[Tensor, "m g"],
    zero: Float[Tensor, "m g"],
    w_packed: UInt8[Tensor, "bytes k"],
    w_scale: Float[Tensor, "g n"],
    w_sums: Tensor,
    w_rest: Float[Tensor, "g n"] | None,
    bias: Tensor | None,
    group_size: int,
    tile_rows: int,
    *,
    rows: int | None = None,
) -> Float[Tensor, "m n"]:
    """The same with a packed weight; `tile_rows` is its `tile`, `rows` the activations a block takes."""
    (m, k), (groups, n) = codes.shape, w_scale.shape
    y = torch.empty(m, n, dtype=torch.float32, device=codes.device)
    if not y.numel():
        return y
    factors = None if w_rest is None else rest_factors(codes, scale, zero, group_size)
    bm, piece = rows or _rows(m), _piece(group_size)
    _packed_kernel[(triton.cdiv(m, bm), triton.cdiv(n, tile_rows))](
        codes.contiguous(), w_packed.view(torch.int8), scale.contiguous(), zero.contiguous(), w_scale, w_sums,
        factors, w_rest, bias, y, m, n, k, group_size, groups,
        BM=bm, BN=tile_rows, BK=piece, STEPS=triton.cdiv(group_size, piece),
        REST=w_rest is not None, BIAS=bias is not None,
        num_warps=8 if bm * tile_rows >= 128 * 128 else 4, num_stages=3,
    )  # fmt: skip
    return y


def _rows(m: int) -> int:
    return max(16, min(128, triton.next_power_of_2(m)))


def _piece(group_size: int) -> int:
    """Columns multiplied at once: the size with the least that reaches over the group's end, the largest such."""
    return min((128, 64, 32), key=lambda piece: (triton.cdiv(group_size, piece) * piece, -piece))
