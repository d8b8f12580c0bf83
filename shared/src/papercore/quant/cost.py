"""What a group-wise quantised layer costs to store."""

import dataclasses

from papercore.errors import InputError
from papercore.quant.affine import resolve_group_size
from papercore.quant.packing import check_bits


@dataclasses.dataclass(frozen=True)
class LayerCost:
    """Counts for one weight of `rows` x `columns`."""

    groups: int
    """scales, all rows together; also the rescaling multiply-adds an integer product needs for every token"""
    packed_bytes: int
    """the codes, rows padded to bytes"""
    scale_bytes: int
    zero_bits: int
    """all zero points together"""
    bits_per_weight: float
    """codes, scales and zero points over the number of weights"""


def layer_cost(
    rows: int, columns: int, bits: int, group_size: int | None, *, scale_bits: int = 16, zero_bits: int = 0
) -> LayerCost:
    """The cost of one layer (Q-DiT specification of size: n b + G (scale bits + zero bits) over n).

    Args:
        bits: of a code, 2 to 8.
        group_size: columns a group; None for whole rows.
        scale_bits: of one scale.
        zero_bits: of one zero point; 0 for symmetric quantisation.
    """
    check_bits(bits)
    for name, value, least in (
        ("rows", rows, 1),
        ("columns", columns, 1),
        ("scale_bits", scale_bits, 0),
        ("zero_bits", zero_bits, 0),
    ):
        if value < least:
            raise InputError(name, found=value, expected=f"at least {least}")
    groups = rows * -(-columns // resolve_group_size(columns, group_size))
    weights = rows * columns
    return LayerCost(
        groups=groups,
        packed_bytes=rows * -(-columns * bits // 8),
        scale_bytes=groups * scale_bits // 8,
        zero_bits=groups * zero_bits,
        bits_per_weight=(weights * bits + groups * (scale_bits + zero_bits)) / weights,
    )
