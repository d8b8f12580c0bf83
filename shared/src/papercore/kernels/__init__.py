"""Operators with a slow, obvious reference and faster implementations."""

from papercore.kernels.cpu import has_fast_integers
from papercore.kernels.group_gemm import group_gemm
from papercore.kernels.operators import QuantizedRows, group_linear, quantize_rows
from papercore.kernels.prepared import PackedWeight, PreparedWeight, pack_weight, prepare_weight

__all__ = [
    "PackedWeight",
    "PreparedWeight",
    "QuantizedRows",
    "group_gemm",
    "group_linear",
    "has_fast_integers",
    "pack_weight",
    "prepare_weight",
    "quantize_rows",
]
