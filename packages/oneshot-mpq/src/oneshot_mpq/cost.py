"""Bit operations and size of a configuration (specification of the method, 2.7)."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int
from numpy.typing import NDArray
from papercore.errors import InputError
from papercore.quant.macs import bitops

from oneshot_mpq.bitconfig import BitConfig
from oneshot_mpq.supernet import Supernet

MIB = 8 * 2**20
"""bits"""


class LayerCost(NamedTuple):
    """Of one layer."""

    name: str
    weight_bits: int
    act_bits: int
    bitops_G: float
    size_MiB: float


class Cost(NamedTuple):
    """Of a network; the fixed layers are in it, counted at 8 bits also where the input is not quantised."""

    bitops_G: float
    """1e9; a multiply-accumulate of w and a bits counts w a"""
    size_MiB: float
    """of the weights, without biases, batch norms and steps"""
    per_layer: tuple[LayerCost, ...]
    """searchable layers, then fixed ones"""


class CostModel:
    """Counts from the multiply-accumulates of the float network, traced once."""

    def __init__(self, net: Supernet) -> None:
        self.names, self.fixed = tuple(net.layers), tuple(net.fixed)
        everything = {**net.layers, **net.fixed}
        self.macs: Int[NDArray[np.int64], " layers"] = np.array([net.macs[name] for name in everything], np.int64)
        self.weights: Int[NDArray[np.int64], " layers"] = np.array(
            [layer.weight.numel() for layer in everything.values()], np.int64
        )

    def cost(self, config: BitConfig) -> Cost:
        """Of a configuration of this network.

        Raises:
            InputError: it has other layers.
        """
        searched, fixed = {b.name: b for b in config.layers}, {b.name: b for b in config.fixed}
        if tuple(searched) != self.names or set(fixed) != set(self.fixed):
            raise InputError("the bit configuration", found=config.model, expected="the layers of this network")
        rows = [(n, searched[n].weight_bits, searched[n].act_bits) for n in self.names]
        rows += [(n, fixed[n].weight_bits, fixed[n].act_bits or 8) for n in self.fixed]
        weight_bits, act_bits = (np.array([row[i] for row in rows], np.int64) for i in (1, 2))
        sizes = weight_bits * self.weights
        layers = tuple(
            LayerCost(name, w, a, w * a * int(macs) / 1e9, int(size) / MIB)
            for (name, w, a), macs, size in zip(rows, self.macs, sizes, strict=True)
        )
        return Cost(int(bitops(self.macs, weight_bits, act_bits)) / 1e9, int(sizes.sum()) / MIB, layers)
