"""What has bits of its own in a network, in the order of its genes, and which of them are pinned."""

import dataclasses
import fnmatch
from collections.abc import Collection, Mapping, Sequence
from typing import Literal

from papercore.errors import InputError
from papercore.quant.affine import code_range
from torch import nn

from tmpqdm.attention import QKV
from tmpqdm.tracing import Trace

Pins = Mapping[str, int | Mapping[str, int]]
"""pattern of operation names, "first" or "last" -> bits of all genes, or gene -> bits"""


@dataclasses.dataclass(frozen=True)
class Op:
    """One thing with bits of its own: a layer, or the two products of an attention."""

    name: str
    """module name in the user's model"""
    kind: Literal["layer", "attention"]
    genes: tuple[str, ...]
    """all its tensors with bits, pinned ones too: ("w", "a"), or ("q", "k", "v") and "p" if softmax is searched"""
    pinned: Mapping[str, int]
    """genes whose bits are fixed (a part of `genes`); a search leaves them alone, a plan lists them"""


def operations(
    named: Mapping[str, nn.Module],
    traced: Trace,
    layers: Collection[str],
    attentions: Collection[str],
    softmax: bool,
    pins: Pins,
) -> tuple[Op, ...]:
    """The operations in pre-order of the modules.

    Args:
        named: all modules of the model.
        softmax: whether the softmax matrix has a gene.

    Raises:
        InputError: a pin that fits no operation, an unknown gene, or bits outside of 2..16.
    """
    kinds: dict[str, tuple[str, ...]] = dict.fromkeys(layers, ("w", "a"))
    kinds |= dict.fromkeys(attentions, (*QKV, "p") if softmax else QKV)
    ends = _ends([name for name in traced.units if name in layers] or list(layers))
    pinned: dict[str, dict[str, int]] = {}
    for pattern, value in pins.items():
        names = [ends[pattern]] if pattern in ends else fnmatch.filter(kinds, pattern)
        if not names:
            raise InputError(f"pin {pattern}", found="no operation of this name", expected="a pattern that fits one")
        for name in names:
            wanted = dict(value) if isinstance(value, Mapping) else dict.fromkeys(kinds[name], value)
            for gene, bits in wanted.items():
                if gene not in kinds[name]:
                    raise InputError(f"pin {pattern}", found=f"gene {gene}", expected=", ".join(kinds[name]))
                code_range(bits, symmetric=False)
            pinned.setdefault(name, {}).update(wanted)
    return tuple(
        Op(name, "layer" if name in layers else "attention", kinds[name], pinned.get(name, {}))
        for name in named
        if name in kinds
    )


def _ends(order: Sequence[str]) -> dict[str, str]:
    """The layers that x enters and leaves by. Embeddings of time and class are called before them: they see no x."""
    names = [name for name in order if "time" not in name and "class_embed" not in name] or list(order)
    return {"first": names[0], "last": names[-1]} if names else {}
