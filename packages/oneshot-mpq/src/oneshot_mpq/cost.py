"""Bit operations, size and latency of a configuration (specification of the method, 2.7)."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import ArrayLike, NDArray
from papercore.errors import InputError
from papercore.quant.macs import bitops

from oneshot_mpq.bitconfig import BitConfig
from oneshot_mpq.lsq import FLOAT
from oneshot_mpq.supernet import Supernet

MIB = 8 * 2**20
"""bits"""
UNITS = ("bitops_G", "size_MiB", "latency_ms")

Latency = Mapping[str, Mapping[tuple[int, int], float]]
"""layer -> (weight bits, activation bits) -> milliseconds; for fixed layers one pair, or none (0 ms)"""


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


class StrictCost(NamedTuple):
    """What the usual count leaves out is in it."""

    bitops_G: float
    """inputs that are not quantised count 32 bits"""
    size_MiB: float
    """with biases, one batch norm a layer folded to a factor and an offset a channel, and steps, 32 bits each"""


class CostModel:
    """Counts from the multiply-accumulates of the float network, traced once.

    Args:
        latency: measured milliseconds, for budgets in `latency_ms`; every searchable layer at every pair.

    Raises:
        InputError: the latency table lacks a layer or a pair, or holds something that is no time.
    """

    def __init__(self, net: Supernet, latency: Latency | None = None) -> None:
        self.net, self.names, self.fixed = net, tuple(net.layers), tuple(net.fixed)
        everything = {**net.layers, **net.fixed}
        self.macs: Int[NDArray[np.int64], " layers"] = np.array([net.macs[name] for name in everything], np.int64)
        self.weights: Int[NDArray[np.int64], " layers"] = np.array(
            [layer.weight.numel() for layer in everything.values()], np.int64
        )
        self.latency = None if latency is None else _checked(latency, net)

    def cost(self, config: BitConfig) -> Cost:
        """Of a configuration of this network.

        Raises:
            InputError: it has other layers.
        """
        rows = [(name, w, a or 8) for name, w, a in self._rows(config)]
        weight_bits, act_bits = (np.array([row[i] for row in rows], np.int64) for i in (1, 2))
        sizes = weight_bits * self.weights
        layers = tuple(
            LayerCost(name, w, a, w * a * int(macs) / 1e9, int(size) / MIB)
            for (name, w, a), macs, size in zip(rows, self.macs, sizes, strict=True)
        )
        return Cost(int(bitops(self.macs, weight_bits, act_bits)) / 1e9, int(sizes.sum()) / MIB, layers)

    def strict(self, config: BitConfig) -> StrictCost:
        """See the class.

        Raises:
            InputError: it has other layers.
        """
        operations, bits = 0, 0
        for (name, w, a), macs, size in zip(self._rows(config), self.macs, self.weights, strict=True):
            layer = self.net.layers.get(name) or self.net.fixed[name]
            operations += w * (a or FLOAT) * int(macs)
            numbers = 0 if layer.bias is None else layer.bias.numel()
            numbers += 0 if layer.batchnorm is None else 2 * layer.batchnorm.channels
            numbers += layer.weight_quantizer.channels or 1 if w < FLOAT else 0
            numbers += int(a is not None and a < FLOAT)
            bits += w * int(size) + FLOAT * numbers
        return StrictCost(operations / 1e9, bits / MIB)

    def _rows(self, config: BitConfig) -> list[tuple[str, int, int | None]]:
        searched, fixed = {b.name: b for b in config.layers}, {b.name: b for b in config.fixed}
        if tuple(searched) != self.names or set(fixed) != set(self.fixed):
            raise InputError("the bit configuration", found=config.model, expected="the layers of this network")
        rows: list[tuple[str, int, int | None]] = [
            (n, searched[n].weight_bits, searched[n].act_bits) for n in self.names
        ]
        return rows + [(n, fixed[n].weight_bits, fixed[n].act_bits) for n in self.fixed]

    def layer(self, unit: str, layer: int, weight_bits: int, act_bits: int) -> float:
        """What a searchable layer adds, in the unit."""
        if unit == "bitops_G":
            return int(self.macs[layer]) * weight_bits * act_bits / 1e9
        if unit == "size_MiB":
            return int(self.weights[layer]) * weight_bits / MIB
        return self._times()[self.names[layer]][weight_bits, act_bits]

    def fixed_part(self, unit: str) -> float:
        """What the fixed layers add, in the unit."""
        layers, count = list(self.net.fixed.values()), len(self.names)
        if unit == "bitops_G":
            terms = zip(layers, self.macs[count:], strict=True)
            return sum(v.weight_bits * (v.act_bits or 8) * int(m) for v, m in terms) / 1e9
        if unit == "size_MiB":
            return sum(v.weight_bits * int(n) for v, n in zip(layers, self.weights[count:], strict=True)) / MIB
        times = self._times()
        return sum(sum(times.get(name, {}).values()) for name in self.fixed)

    def population(
        self, unit: str, weight_bits: Int[ArrayLike, "n layers"], act_bits: Int[ArrayLike, "n layers"]
    ) -> Float[NDArray[np.float64], " n"]:
        """Costs of many configurations at once, searchable layers in order, the fixed part included."""
        w, a = np.asarray(weight_bits, np.int64), np.asarray(act_bits, np.int64)
        count = len(self.names)
        if unit == "bitops_G":
            return bitops(self.macs[:count], w, a) / 1e9 + self.fixed_part(unit)
        if unit == "size_MiB":
            return (w @ self.weights[:count]) / MIB + self.fixed_part(unit)
        columns = []
        for i, name in enumerate(self.names):
            table = np.full((FLOAT + 1, FLOAT + 1), np.nan)
            for pair, time in self._times()[name].items():
                table[pair] = time
            columns.append(table[w[:, i], a[:, i]])
        return np.stack(columns, 1).sum(1) + self.fixed_part(unit)

    def _times(self) -> Latency:
        if self.latency is None:
            raise InputError("budget latency_ms", found="no latency table", expected="CostModel(net, latency=...)")
        return self.latency


def _checked(latency: Latency, net: Supernet) -> Latency:
    for name, layer in net.layers.items():
        if name not in latency:
            raise InputError("latency", found=f"nothing for {name}", expected="every searchable layer")
        for pair in ((w, a) for w in layer.weight_choices for a in layer.act_choices):
            if pair not in latency[name]:
                raise InputError(f"latency of {name}", found=f"nothing for W{pair[0]}A{pair[1]}", expected="every pair")
    known: Sequence[str] = [*net.layers, *net.fixed]
    for name, pairs in latency.items():
        if name not in known:
            raise InputError("latency", found=name, expected="a layer of the network")
        for pair, time in pairs.items():
            if not (np.isfinite(time) and time >= 0):
                raise InputError(f"latency of {name} at {pair}", found=time, expected="milliseconds, at least 0")
    return latency
