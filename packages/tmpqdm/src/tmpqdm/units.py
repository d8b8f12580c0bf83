"""Units of reconstruction, and one pass through a network that stops at every unit.

Published code runs the whole prefix of the network again for every unit and bit-width, to get the unit's inputs. Here
the calibration set goes through the network once, as one batch: at each unit the pass stops, the unit is worked on in
minibatches, and the pass goes on with the outputs the work returned. Several streams (full precision, quantised) lie
side by side along the batch. What lives in memory is what the network itself keeps for its skip connections, for all
samples at once.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int
from papercore.errors import InputError
from torch import Tensor, nn

from tmpqdm.attention import QuantAttention
from tmpqdm.layers import QuantLayer
from tmpqdm.models import Conditions, predict


@dataclasses.dataclass(frozen=True)
class Unit:
    """A residual block, an attention, a transformer block, or a layer outside of such blocks."""

    name: str
    module: nn.Module
    layers: Mapping[str, QuantLayer]
    attentions: Mapping[str, QuantAttention]
    outside: frozenset[str] = frozenset()
    """layers that the network also calls while this unit is not running"""

    def use(self, bits: Mapping[str, Mapping[str, int]] | None, genes: str = "waqkvp") -> None:
        """Switches its operations to `bits` (operation -> gene -> bits; None: full precision), `genes` of them."""
        for name, part in (*self.layers.items(), *self.attentions.items()):
            for gene in part.bits:
                part.set(gene, None if bits is None or gene not in genes else bits[name].get(gene))


class Call:
    """What a unit was called with; every tensor with the batch's length along its first dimension is cut with it."""

    def __init__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], batch: int) -> None:
        self.args, self.kwargs, self.batch = args, dict(kwargs), batch

    def rows(self, index: slice | Int[Tensor, " rows"]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        def cut(value: Any) -> Any:
            if isinstance(value, Tensor):
                if not value.ndim or len(value) != self.batch:
                    return value
                return value[index if isinstance(index, slice) else index.to(value.device)]
            if isinstance(value, tuple | list):
                return type(value)(map(cut, value))
            return {key: cut(part) for key, part in value.items()} if isinstance(value, dict) else value

        return cut(self.args), cut(self.kwargs)

    def part(self, number: int, parts: int) -> "Call":
        size = self.batch // parts
        return Call(*self.rows(slice(number * size, (number + 1) * size)), size)


Forward = Callable[..., Tensor]
Visit = Callable[[int, Unit, Forward, Sequence[Call]], Sequence[Tensor]]
"""(number of the unit, unit, its forward, one call a stream) -> its outputs, one a stream"""


def in_batches(forward: Forward, call: Call, size: int) -> Tensor:
    """The unit's outputs for a whole call."""
    outputs = []
    for begin in range(0, call.batch, size):
        args, kwargs = call.rows(slice(begin, begin + size))
        outputs.append(forward(*args, **kwargs))
    return torch.cat(outputs)


@torch.no_grad()
def walk(
    network: nn.Module,
    units: Sequence[Unit],
    x: Tensor,
    t: Tensor,
    cond: Conditions,
    *,
    streams: int,
    visit: Visit,
    bits: Sequence[Callable[[str], Mapping[str, int | None]]],
) -> Tensor:
    """Runs the network on `streams` copies of the inputs and lets `visit` do the work of every unit.

    Args:
        visit: called at every call of a unit, in the network's order.
        bits: for every stream, layer name -> bits of its genes, for layers that are called outside of their unit.

    Returns:
        The network's output, the streams one after another.

    Raises:
        InputError: a unit that returns something else than a tensor.
    """
    inside: list[Unit] = []
    with contextlib.ExitStack() as stack:
        for number, unit in enumerate(units):
            forward = unit.module.forward

            def stop(*args: Any, _n: int = number, _u: Unit = unit, _f: Forward = forward, **kwargs: Any) -> Tensor:
                call = Call(args, kwargs, len(x) * streams)
                inside.append(_u)
                try:
                    outputs = visit(_n, _u, _f, [call.part(i, streams) for i in range(streams)])
                finally:
                    inside.pop()
                if not all(isinstance(output, Tensor) for output in outputs):
                    raise InputError(f"output of unit {_u.name}", found="no single tensor", expected="a tensor")
                return torch.cat(list(outputs))

            stack.enter_context(_replaced(unit.module, stop))
            for name in unit.outside:
                stack.enter_context(_replaced(unit.layers[name], _by_stream(name, unit, inside, bits)))
        return predict(
            network,
            torch.cat([x] * streams),
            torch.cat([t] * streams),
            {name: torch.cat([value] * streams) for name, value in cond.items()},
        )


def _by_stream(
    name: str, unit: Unit, inside: Sequence[Unit], bits: Sequence[Callable[[str], Mapping[str, int | None]]]
) -> Forward:
    layer = unit.layers[name]
    forward = layer.forward

    def run(x: Tensor) -> Tensor:
        if unit in inside:
            return forward(x)
        outputs = []
        for part, choose in zip(x.chunk(len(bits)), bits, strict=True):
            layer.use(**choose(name))
            outputs.append(forward(part))
        return torch.cat(outputs)

    return run


@contextlib.contextmanager
def _replaced(module: nn.Module, forward: Forward) -> Iterator[None]:
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
