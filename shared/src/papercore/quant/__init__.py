"""Affine quantisation as small pure functions, observers, packing and cost."""

from papercore.quant.affine import (
    Parameters,
    choose_parameters,
    dequantize,
    fake_quantize,
    fake_quantize_with,
    group_dequantize,
    group_quantize,
    quantize,
)
from papercore.quant.cost import LayerCost, layer_cost
from papercore.quant.observers import RangeObserver
from papercore.quant.packing import pack_codes, unpack_codes

__all__ = [
    "LayerCost",
    "Parameters",
    "RangeObserver",
    "choose_parameters",
    "dequantize",
    "fake_quantize",
    "fake_quantize_with",
    "group_dequantize",
    "group_quantize",
    "layer_cost",
    "pack_codes",
    "quantize",
    "unpack_codes",
]
