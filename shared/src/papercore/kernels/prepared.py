"""A quantised weight laid out for integer products, and what every back end needs to know of it.

With a centre c[n, u] for every row and group such that w' = qw - c fits int8, and r = zw - c what is left of the zero
point, the product of `group_gemm` becomes

    y[m, n] = sum over u of sx sw (sum_k qx w' - zx sum_k w') - sum over u of (sx X) (sw r) + bias

with X[m, u] = sum_k (qx - zx). The difference in the brackets is taken in integers, because its terms are often fifty
times larger than it is. The second sum is a float32 product of inner length G, present only where some r is not 0: c is
the zero point wherever the codes allow it, which they always do up to 7 bits; with 8 bits r is as small as possible.
"""

import dataclasses

import torch
from jaxtyping import Float, Int, Int8, UInt8
from torch import Tensor
from torch.nn import functional

from papercore.errors import InputError
from papercore.quant.affine import resolve_group_size, split_groups

LONGEST_GROUP = (2**31 - 1) // (2 * 255 * 128)
"""columns whose products of uint8 and int8 codes, corrected by the zero point, certainly fit int32"""


@dataclasses.dataclass(frozen=True, eq=False)
class PreparedWeight:
    """A weight [N, K] with one scale for every row and group, ready for `group_linear`."""

    codes: Int8[Tensor, "n k"]
    """w'"""
    scale: Float[Tensor, "g n"]
    """sw, float32"""
    sums: Int[Tensor, "g n"]
    """sum over a group of w', int32"""
    rest: Float[Tensor, "g n"] | None
    """-sw r, float32; None where it is all zero"""
    group_size: int

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape


def prepare_weight(
    codes: Int[Tensor, "n k"], scale: Float[Tensor, "n g"], zero: Tensor, group_size: int | None, *, bits: int = 8
) -> PreparedWeight:
    """The weight in the form above.

    Args:
        codes: at most `bits` bits, signed or unsigned, any integer type.
        scale, zero: of every row and group; zero points hold whole numbers.
        group_size: columns a group; the last group may be shorter; None for whole rows.
        bits: that w' may take; 8, or 4 for a weight that is to be packed.

    Raises:
        InputError: shapes that do not fit, codes of more bits, groups too long for int32.
    """
    if codes.ndim != 2:
        raise InputError("codes", found=f"shape {tuple(codes.shape)}", expected="two dimensions")
    rows, columns = codes.shape
    size = resolve_group_size(columns, group_size)
    if size > LONGEST_GROUP:
        raise InputError("group size", found=size, expected=f"at most {LONGEST_GROUP}, or sums overflow 32 bits")
    groups = -(-columns // size)
    for name, value in (("scale", scale), ("zero", zero)):
        if value.shape != (rows, groups):
            raise InputError(name, found=f"shape {tuple(value.shape)}", expected=f"({rows}, {groups})")
    wide, zero, half = codes.to(torch.int16), zero.to(torch.int16), 2 ** (bits - 1)
    centre = zero
    if wide.numel():
        parts = wide.split(size, 1)
        low = torch.stack([part.amin(1) for part in parts], 1)
        high = torch.stack([part.amax(1) for part in parts], 1)
        if bool((high - low >= 2 * half).any()):
            raise InputError("codes", found=f"{int(low.min())}..{int(high.max())}", expected=f"at most {bits} bits")
        centre = zero.maximum(high - half + 1).minimum(low + half)
    centred = (wide - centre.repeat_interleave(size, 1)[:, :columns]).to(torch.int8)
    sums = split_groups(centred, size).sum(-1, dtype=torch.int32)
    rest, scale = zero - centre, scale.float()
    remainder = (-scale * rest).t().contiguous() if bool(rest.any()) else None
    return PreparedWeight(centred, scale.t().contiguous(), sums.t().contiguous(), remainder, size)


def rest_factors(
    codes: Int[Tensor, "m k"], scale: Float[Tensor, "m g"], zero: Float[Tensor, "m g"], group_size: int
) -> Float[Tensor, "m g"]:
    """The activations' side of the second sum, sx X."""
    sums = split_groups(codes, group_size).sum(-1, dtype=torch.int32)
    lengths = torch.full_like(scale[:1], group_size)
    lengths[:, -1:] = codes.shape[1] - group_size * (scale.shape[1] - 1)
    return scale * (sums - lengths * zero)


@dataclasses.dataclass(frozen=True, eq=False)
class PackedWeight:
    """A weight of at most 4 bits, two codes a byte, ready for `group_linear`.

    Rows come in tiles of `tile`; a byte holds row j of a tile in its low half and row j + tile / 2 in its high half, so
    that unpacking a tile gives two blocks of rows and moves nothing between columns, whatever the group size is.
    """

    packed: UInt8[Tensor, "bytes k"]
    scale: Float[Tensor, "g n"]
    sums: Int[Tensor, "g n"]
    rest: Float[Tensor, "g n"] | None
    group_size: int
    tile: int
    """even; the last tile is filled with zeros"""

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.scale.shape[1], self.packed.shape[1]))


def pack_weight(weight: PreparedWeight, *, tile: int = 128) -> PackedWeight:
    """The packed form of a weight prepared with `bits=4`.

    Raises:
        InputError: its codes take more than 4 bits, or `tile` is odd.
    """
    if weight.codes.numel() and not (int(weight.codes.min()) >= -8 and int(weight.codes.max()) <= 7):
        found = f"{int(weight.codes.min())}..{int(weight.codes.max())}"
        raise InputError("codes", found=found, expected="-8..7", hint="prepare the weight with bits=4")
    if tile < 2 or tile % 2:
        raise InputError("tile", found=tile, expected="an even number of rows")
    rows, columns = weight.shape
    padded = functional.pad(weight.codes, (0, 0, 0, -rows % tile)).view(-1, 2, tile // 2, columns)
    packed = ((padded[:, 0] & 15) | (padded[:, 1] << 4)).view(torch.uint8).reshape(-1, columns)
    return PackedWeight(packed, weight.scale, weight.sums, weight.rest, weight.group_size, tile)


def unpack_rows(packed: UInt8[Tensor, "bytes k"], tile: int) -> Int8[Tensor, "n k"]:
    """The codes of whole tiles."""
    signed = packed.view(torch.int8).view(-1, tile // 2, packed.shape[1])
    return torch.stack([(signed << 4) >> 4, signed >> 4], 1).reshape(-1, packed.shape[1])
