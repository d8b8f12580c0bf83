"""GPTQ with groups: rounding that lets later columns make up for the error of earlier ones (arXiv 2210.17323).

For a layer with inputs x: H = 2 sum x x^T / n, damped by `percdamp` of its mean diagonal; U the upper Cholesky factor
of H^-1. Column after column is quantised, and its error, divided by U_jj, is subtracted from the columns to its right
in proportion to U's row. Columns are worked in blocks: inside a block at once, right of it by one matrix product.

A group's scale comes from its weights as they are when the group begins (with all corrections so far).

Symmetric rounding uses all 2^b codes: s = 2 max|w| / (2^b - 1), codes 0..2^b - 1 around the zero point 2^(b-1), as the
original code does (docs/decisions/0004); no value is then further than half a step from a code.
"""

import dataclasses

import torch
from jaxtyping import Float
from papercore.errors import InputError
from papercore.quant import Parameters, choose_parameters, group_dequantize
from papercore.quant.affine import code_range, parameters_of_range, resolve_group_size
from papercore.quant.packing import check_bits
from torch import Tensor


class Hessian:
    """H = 2 sum x x^T / n over the rows seen, float32.

    Args:
        columns: K, the inputs of the layer.
    """

    def __init__(self, columns: int, device: torch.device | str = "cpu") -> None:
        self.sum = torch.zeros(columns, columns, device=device)
        self.rows = 0

    def add(self, x: Float[Tensor, "*rows columns"]) -> None:
        """Takes inputs [..., K] into account.

        Raises:
            InputError: another number of columns, or values that are not finite.
        """
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        if rows.shape[1] != len(self.sum):
            raise InputError("calibration input", found=f"{rows.shape[1]} columns", expected=str(len(self.sum)))
        if not torch.isfinite(rows).all():
            raise InputError("calibration input", found="values that are not finite", expected="finite ones")
        self.sum += rows.T @ rows
        self.rows += len(rows)

    @property
    def value(self) -> Float[Tensor, "columns columns"]:
        return self.sum * (2 / max(1, self.rows))


@dataclasses.dataclass(frozen=True)
class GPTQResult:
    """A rounded weight."""

    codes: Tensor
    """[N, K] int16, 0..2^b - 1"""
    scale: Tensor
    """[N, G] float32"""
    zero: Tensor
    """[N, G] float32; symmetric: 2^(b-1) everywhere"""
    loss: float
    """sum of the squared scaled errors: the estimated increase of the output error"""
    group_size: int
    dead_columns: int
    """inputs that were always zero; their weights are set to zero"""
    damping: float
    """the share of the mean diagonal that was needed"""

    def dequantize(self) -> Float[Tensor, "rows columns"]:
        return group_dequantize(self.codes, self.scale, self.zero, self.group_size)


class SingularHessianError(ArithmeticError):
    """The Hessian cannot be factorised even with a thousandfold damping."""


@torch.no_grad()
def gptq(
    weight: Float[Tensor, "rows columns"],
    hessian: Hessian | Float[Tensor, "columns columns"],
    bits: int,
    group_size: int | None,
    *,
    symmetric: bool = False,
    percdamp: float = 0.01,
    block_size: int = 128,
    act_order: bool = False,
    scale_dtype: torch.dtype = torch.float32,
) -> GPTQResult:
    """Rounds `weight` [N, K] for the inputs that `hessian` saw.

    Args:
        bits: 2 to 8.
        group_size: columns a group; None for whole rows.
        percdamp: damping as a share of the mean diagonal; ten times as much is tried, at most three times, when the
            factorisation fails.
        act_order: columns with large inputs first; then a group's scale comes from the uncorrected weights, and codes,
            scales and zero points stay in the original order.
        scale_dtype: float16 rounds scales to half precision before they are used.

    Raises:
        SingularHessianError: no damping was enough; round to nearest instead.
        InputError: shapes that do not fit.
    """
    check_bits(bits)
    if block_size < 1:
        raise InputError("block_size", found=block_size, expected="at least 1")
    if not torch.isfinite(weight).all():
        raise InputError("weight", found="values that are not finite", expected="finite ones")
    h = (hessian.value if isinstance(hessian, Hessian) else hessian).double().clone()
    w = weight.detach().float().clone()
    rows, columns = w.shape
    if h.shape != (columns, columns):
        raise InputError("Hessian", found=f"shape {tuple(h.shape)}", expected=f"({columns}, {columns})")
    size = resolve_group_size(columns, group_size)
    largest = code_range(bits, symmetric=False)[1]

    dead = h.diagonal() == 0
    h.diagonal()[dead] = 1
    w[:, dead] = 0
    order = h.diagonal().argsort(descending=True, stable=True) if act_order else torch.arange(columns, device=w.device)
    upper, damping = _factor(h[order][:, order], percdamp)
    upper = upper.to(torch.float32)

    def parameters_of(part: Tensor) -> Parameters:
        if not symmetric:
            return choose_parameters(part, bits, None, scale_dtype=scale_dtype)
        high = part.abs().amax(-1, keepdim=True)
        chosen = parameters_of_range(-high, high, bits, scale_dtype=scale_dtype)
        return Parameters(chosen.scale, torch.full_like(high, 2 ** (bits - 1)))

    groups = -(-columns // size)
    scale, zero = w.new_zeros(rows, groups), w.new_zeros(rows, groups)
    if act_order:
        for u in range(groups):
            chosen = parameters_of(w[:, u * size : (u + 1) * size])
            scale[:, u], zero[:, u] = chosen.scale[:, 0], chosen.zero[:, 0]
    w = w[:, order]
    codes = torch.zeros(rows, columns, dtype=torch.int16, device=w.device)
    loss = 0.0
    for first in range(0, columns, block_size):
        last = min(first + block_size, columns)
        errors = w.new_zeros(rows, last - first)
        for j in range(first, last):
            u = int(order[j]) // size
            if not act_order and j % size == 0:
                # corrections by this block's own columns have reached w only up to `last`
                ahead = w[:, j : j + size].clone()
                if j + size > last:
                    reach = min(j + size, columns)
                    ahead[:, last - j :] -= errors[:, : j - first] @ upper[first:j, last:reach]
                chosen = parameters_of(ahead)
                scale[:, u], zero[:, u] = chosen.scale[:, 0], chosen.zero[:, 0]
            code = ((w[:, j] / scale[:, u]).round() + zero[:, u]).clamp(0, largest)
            codes[:, order[j]] = code.to(torch.int16)
            error = (w[:, j] - (code - zero[:, u]) * scale[:, u]) / upper[j, j]
            w[:, j:last] -= error[:, None] * upper[j, j:last]
            errors[:, j - first] = error
        w[:, last:] -= errors @ upper[first:last, last:]
        loss += float(errors.double().square().sum())
    return GPTQResult(codes, scale, zero, loss, size, int(dead.sum()), damping)


def _factor(h: Tensor, percdamp: float) -> tuple[Tensor, float]:
    """U with H^-1 = U^T U, upper triangular, float64; and the damping that was needed."""
    mean = h.diagonal().mean()
    for factor in (1, 10, 100, 1000):
        damped = h.clone()
        damped.diagonal().add_(percdamp * factor * mean)
        lower, info = torch.linalg.cholesky_ex(damped)
        if info == 0:
            upper, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if info == 0 and torch.isfinite(upper).all():
                return upper, percdamp * factor
    raise SingularHessianError(f"no Cholesky factor even with {1000 * percdamp:g} times the mean diagonal added")
