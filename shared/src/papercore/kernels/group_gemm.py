"""Integer matrix product of group-wise quantised activations and weights.

acc[u, m, n] = sum over the columns k of group u of (qx[m, k] - zx[m, u]) (qw[n, k] - zw[n, u])      exact, int32
y[m, n]      = sum over u of sx[m, u] sw[n, u] acc[u, m, n] + bias[n]                              float32

This takes codes as they are and lays them out at every call. Where a weight is used again, `prepare_weight` does its
part once and `quantize_rows` and `group_linear` do the rest.
"""

import os
from importlib.util import find_spec
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from papercore.errors import InputError
from papercore.kernels.operators import QuantizedRows, as_int8, group_linear
from papercore.kernels.prepared import prepare_weight
from papercore.quant.affine import resolve_group_size, split_groups

Backend = Literal["auto", "reference", "cpu", "triton"]


LARGEST_GROUP = (2**31 - 1) // 255**2
"""columns of a group whose exact sum of products always fits into int32"""


def group_gemm(
    qx: Int[Tensor, "m k"],
    sx: Float[Tensor, "m g"],
    zx: Tensor,
    qw: Int[Tensor, "n k"],
    sw: Float[Tensor, "n g"],
    zw: Tensor,
    group_size: int | None,
    bias: Float[Tensor, " n"] | None = None,
    *,
    backend: Backend = "auto",
    return_accumulators: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """y [M, N] float32, and with `return_accumulators` also acc [G, M, N] int32.

    Args:
        qx, qw: codes of at most 8 bits, signed or unsigned, any integer type.
        sx, sw, zx, zw: scale and zero point of every row and group; zero points hold whole numbers.
        group_size: columns a group; the last group may be shorter.
        backend: "reference" sums in int64; "cpu" uses torch's 8-bit product; "triton" needs a GPU, or Triton's
            interpreter; "auto" takes "cpu" on the CPU, and on a GPU "triton" where Triton is installed.

    Raises:
        InputError: shapes that do not fit, codes of more than 8 bits, groups too large for int32, an unknown back end,
            or one that the device has not.
    """
    size = resolve_group_size(qx.shape[1], group_size)
    groups = -(-qx.shape[1] // size)
    for name, value, rows in (("sx", sx, qx), ("zx", zx, qx), ("sw", sw, qw), ("zw", zw, qw)):
        if value.shape != (rows.shape[0], groups):
            raise InputError(name, found=f"shape {tuple(value.shape)}", expected=f"({rows.shape[0]}, {groups})")
    if qx.shape[1] != qw.shape[1]:
        raise InputError("qw", found=f"{qw.shape[1]} columns", expected=f"{qx.shape[1]} as in qx")
    if bias is not None and bias.shape != qw.shape[:1]:
        raise InputError("bias", found=f"shape {tuple(bias.shape)}", expected=f"({qw.shape[0]},)")
    if size > LARGEST_GROUP:
        raise InputError("group size", found=size, expected=f"at most {LARGEST_GROUP}, whose sums fit into 32 bits")
    for name, codes in (("qx", qx), ("qw", qw)):
        if codes.numel() and not -128 <= int(codes.min()) <= int(codes.max()) <= 255:
            raise InputError(f"{name} codes", found=f"{int(codes.min())}..{int(codes.max())}", expected="8 bits")
    chosen = _resolve(backend, qx.device)
    if chosen == "triton":
        return _triton(qx, sx, zx, qw, sw, zw, size, bias, return_accumulators)
    if chosen == "cpu" and not return_accumulators:
        return group_linear(_rows(qx, sx, zx), prepare_weight(qw, sw, zw, size), bias)
    integer = _accumulate_reference if chosen == "reference" else _accumulate_int8
    y = torch.zeros(qx.shape[0], qw.shape[0], dtype=torch.float32, device=qx.device)
    kept = []
    for u in range(groups):
        columns = slice(u * size, min((u + 1) * size, qx.shape[1]))
        acc = integer(qx[:, columns], zx[:, u], qw[:, columns], zw[:, u])
        y.addcmul_(acc.float(), sx[:, u, None].float() * sw[None, :, u].float())
        if return_accumulators:
            kept.append(acc)
    if bias is not None:
        y += bias.float()
    return (y, torch.stack(kept)) if return_accumulators else y


def _resolve(backend: str, device: torch.device) -> str:
    if backend not in ("auto", "reference", "cpu", "triton"):
        raise InputError("backend", found=backend, expected="auto, reference, cpu or triton")
    if backend == "auto":
        if device.type == "cpu":
            return "cpu"
        return "triton" if device.type == "cuda" and find_spec("triton") is not None else "reference"
    if backend == "cpu" and device.type != "cpu":
        raise InputError("backend", found=backend, expected=f"auto, reference or triton on {device.type}")
    if backend == "triton":
        if find_spec("triton") is None:
            raise InputError("backend", found=backend, expected="Triton installed")
        if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            raise InputError("backend", found=f"triton for tensors on {device.type}", expected="tensors on a GPU")
    return backend


def _rows(qx: Tensor, sx: Tensor, zx: Tensor) -> QuantizedRows:
    """Activations of any integer type as unsigned codes, with zero points moved along."""
    offset = 128 if qx.numel() and int(qx.min()) < 0 else 0
    return QuantizedRows((qx.to(torch.int16) + offset).to(torch.uint8), sx.float(), zx.float() + offset)


def _triton(
    qx: Tensor, sx: Tensor, zx: Tensor, qw: Tensor, sw: Tensor, zw: Tensor, size: int, bias: Tensor | None, keep: bool
) -> Tensor | tuple[Tensor, Tensor]:
    from papercore.kernels import triton_kernels

    rows, weight = _rows(qx, sx, zx), prepare_weight(qw, sw, zw, size)
    codes, zero = as_int8(rows.codes, rows.zero)
    acc = None
    if keep:
        acc = torch.zeros(sx.shape[1], len(qx), len(qw), dtype=torch.int32, device=qx.device)
    y = triton_kernels.group_linear(
        codes, rows.scale, zero, weight.codes, weight.scale, weight.sums, weight.rest, bias, size, accumulators=acc
    )
    if acc is None:
        return y
    # The kernel's sums are of w'; what the centre left of the zero point is subtracted here.
    rest = zw.to(torch.int32).T - (qw.to(torch.int32) - weight.codes)[:, ::size].T
    sums = split_groups(codes, size).sum(-1, dtype=torch.int32)
    lengths = torch.full((sx.shape[1],), size, dtype=torch.int32, device=qx.device)
    lengths[-1:] = qx.shape[1] - size * (sx.shape[1] - 1)
    return y, acc - (sums - lengths * zero.to(torch.int32)).T[:, :, None] * rest[:, None]


def _accumulate_reference(qx: Tensor, zx: Tensor, qw: Tensor, zw: Tensor) -> Tensor:
    """The definition."""
    x, w = qx.long() - zx.long()[:, None], qw.long() - zw.long()[:, None]
    if x.device.type == "cuda":  # no integer product there; float64 holds these sums exactly
        return (x.double() @ w.double().T).to(torch.int32)
    return (x @ w.T).to(torch.int32)


def _accumulate_int8(qx: Tensor, zx: Tensor, qw: Tensor, zw: Tensor) -> Tensor:
    """The same from one product of int8 codes: sum (x - zx)(w - zw) = xw - zx sum w - zw sum x + n zx zw.

    Codes and zero points are moved by the same offset into the range of int8, which leaves the differences alone.
    """
    ox, ow = (128 if codes.numel() and int(codes.max()) > 127 else 0 for codes in (qx, qw))
    x, w = (qx - ox).to(torch.int8), (qw - ow).to(torch.int8)
    shift_x, shift_w = zx.to(torch.int32) - ox, zw.to(torch.int32) - ow
    acc = torch._int_mm(x, w.T)  # pyright: ignore[reportPrivateImportUsage]
    acc -= shift_x[:, None] * w.sum(1, dtype=torch.int32)[None]
    acc -= x.sum(1, dtype=torch.int32)[:, None] * shift_w[None]
    acc += x.shape[1] * shift_x[:, None] * shift_w[None]
    return acc
