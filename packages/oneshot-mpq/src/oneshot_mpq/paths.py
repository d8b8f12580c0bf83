"""The bit-widths that the random passes of a training step use (specification of the method, 2.3)."""

from typing import NamedTuple

import torch

from oneshot_mpq.supernet import Supernet


class Path(NamedTuple):
    """One number for every searchable layer."""

    weight_bits: tuple[int, ...]
    act_bits: tuple[int, ...]


def sample_paths(net: Supernet, count: int, generator: torch.Generator) -> list[Path]:
    """Every layer's bits independent and uniform over its candidates of now.

    Args:
        generator: on the CPU, used for nothing else, so that all processes draw the same paths.
    """
    layers = list(net.layers.values())
    draws = torch.rand(count, len(layers), 2, generator=generator, dtype=torch.float64).tolist()

    def pick(choices: tuple[int, ...], draw: float) -> int:
        return choices[int(draw * len(choices))]

    return [
        Path(
            tuple(pick(layer.allowed_weight_bits, w) for layer, (w, _) in zip(layers, row, strict=True)),
            tuple(pick(layer.act_choices, a) for layer, (_, a) in zip(layers, row, strict=True)),
        )
        for row in draws
    ]


def largest_path(net: Supernet) -> Path:
    """The most bits that every layer may have now."""
    layers = net.layers.values()
    return Path(
        tuple(layer.allowed_weight_bits[-1] for layer in layers),
        tuple(layer.act_choices[-1] for layer in layers),
    )


def aligned(net: Supernet, path: Path) -> frozenset[str]:
    """The layers that this path runs at the lowest weight bit they may have now: their outputs are drawn to those of
    the largest path."""
    return frozenset(
        name
        for (name, layer), bits in zip(net.layers.items(), path.weight_bits, strict=True)
        if bits == layer.allowed_weight_bits[0]
    )
