"""Integer matrix product of group-wise quantised activations and weights.

acc[u, m, n] = sum over the columns k of group u of (qx[m, k] - zx[m, u]) (qw[n, k] - zw[n, u])      exact, int32
y[m, n]      = sum over u of sx[m, u] sw[n, u] acc[u, m, n] + bias[n]                              float32
"""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from papercore.errors import InputError
from papercore.quant.affine import resolve_group_size

Backend = Literal["auto", "reference", "cpu"]


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
        backend: "reference" sums in int64; "cpu" uses torch's int8 product and needs differences code - zero point
            that fit: always for the activations, and for weights of up to 8 bits; "auto" takes "cpu" where it applies.

    Raises:
        InputError: shapes that do not fit, or an unknown back end.
    """
    size = resolve_group_size(qx.shape[1], group_size)
    groups = -(-qx.shape[1] // size)
    for name, value, rows in (("sx", sx, qx), ("zx", zx, qx), ("sw", sw, qw), ("zw", zw, qw)):
        if value.shape != (rows.shape[0], groups):
            raise InputError(name, found=f"shape {tuple(value.shape)}", expected=f"({rows.shape[0]}, {groups})")
    if qx.shape[1] != qw.shape[1]:
        raise InputError("qw", found=f"{qw.shape[1]} columns", expected=f"{qx.shape[1]} as in qx")
    if backend not in ("auto", "reference", "cpu"):
        raise InputError("backend", found=backend, expected="auto, reference or cpu")
    integer = _accumulate_reference if backend == "reference" or qx.device.type != "cpu" else _accumulate_int8
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
