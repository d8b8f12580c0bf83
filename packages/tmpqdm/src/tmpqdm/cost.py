"""What a plan costs: BitOps for an image and a step, and bytes (TMPQ-DM, arXiv 2404.09532; attention counted right).

BitOps = sum over layers of MACs x weight bits x activation bits, and over attentions of MACs(q k) x q bits x k bits
and MACs(p v) x p bits x v bits. The published code traces two images and counts attention for one: "published".
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Int64, Integer
from papercore.errors import InputError
from papercore.quant.macs import bitops as population_bitops
from papercore.quant.macs import trace
from papercore.report import Table
from torch import nn

Bits = Mapping[str, Mapping[str, int]]
Convention = Literal["image", "published"]
Gene = tuple[str, str]
FULL_PRECISION = 32


@dataclasses.dataclass(frozen=True)
class LayerEntry:
    """A convolution or linear layer."""

    name: str
    macs: int
    """for one image and one step"""
    weights: int
    channels: int
    """of the output: scales of the weight, for every half"""
    bias: int = 0
    halves: int = 1
    """2 for a split shortcut"""


@dataclasses.dataclass(frozen=True)
class AttentionEntry:
    """The two products of an attention."""

    name: str
    qk: int
    sv: int


@dataclasses.dataclass(frozen=True)
class CostModel:
    """Counts of one network."""

    layers: tuple[LayerEntry, ...]
    attentions: tuple[AttentionEntry, ...] = ()
    softmax_bits: int | None = 8
    """of the softmax matrix where a plan says nothing; None: 32"""
    other_parameters: int = 0
    """that are not quantised: norms, embeddings"""
    unused: tuple[str, ...] = ()
    """layers that are never called: not counted"""
    shared: tuple[str, ...] = ()
    """layers that are called several times: their MACs are summed"""

    @classmethod
    def trace(
        cls,
        model: nn.Module,
        example_inputs: Any = None,
        *,
        splits: Mapping[str, int] | None = None,
        softmax_bits: int | None = 8,
    ) -> "CostModel":
        """Runs the network once.

        Args:
            example_inputs: (x, t) or (x, t, conditions), one image; None for the families of diffusers.
            splits: shortcuts whose halves have scales of their own, as a solver's `splits`.

        Raises:
            InputError: no example for a network that is not known.
        """
        from tmpqdm.models import as_example, nested
        from tmpqdm.models import example_inputs as known

        x, t, cond = known(model) if example_inputs is None else as_example(example_inputs)
        named = dict(model.named_modules())
        found = trace(model, x[:1], t[:1], **nested(cond))
        layers, products, shared = [], {}, []
        for operation in found.operations:
            if operation.kind in ("qk", "sv"):
                products.setdefault(operation.name, {})[operation.kind] = operation.macs
                continue
            module: Any = named[operation.name]
            bias = 0 if module.bias is None else module.bias.numel()
            channels = module.out_features if isinstance(module, nn.Linear) else module.out_channels
            halves = 2 if operation.name in (splits or {}) else 1
            layers.append(LayerEntry(operation.name, operation.macs, module.weight.numel(), channels, bias, halves))
            if operation.calls > 1:
                shared.append(operation.name)
        total = sum(parameter.numel() for parameter in model.parameters())
        counted = sum(layer.weights + layer.bias for layer in layers)
        attentions = tuple(AttentionEntry(name, p.get("qk", 0), p.get("sv", 0)) for name, p in products.items())
        return cls(tuple(layers), attentions, softmax_bits, total - counted, found.unused, tuple(shared))

    @property
    def genes(self) -> tuple[Gene, ...]:
        """(operation, gene) of everything that has bits here; softmax comes last of an attention's."""
        found: list[Gene] = [(layer.name, gene) for layer in self.layers for gene in ("w", "a")]
        return (*found, *((entry.name, gene) for entry in self.attentions for gene in ("q", "k", "v", "p")))

    def column(self, bits: Bits) -> list[int]:
        """The bits of all genes, in the order of `genes`.

        Raises:
            InputError: an operation or gene without bits.
        """
        values = []
        for name, gene in self.genes:
            given = bits.get(name, {}).get(gene)
            if given is None and gene == "p":
                given = self.softmax_bits or FULL_PRECISION
            if given is None:
                raise InputError(f"bits of {name}", found=f"no {gene}", expected="a number of bits")
            values.append(int(given))
        return values

    def bitops(
        self,
        bits: Bits | Sequence[Bits],
        timesteps: Sequence[int] | int = 1,
        *,
        convention: Convention = "image",
        guidance: bool = False,
    ) -> int:
        """Of one image over all visited timesteps.

        Args:
            bits: for all steps, or one for every step.
            timesteps: the list, or how many; 1: of one step.
            convention: "published": two images' layers and one image's attention, for UNets with attention blocks.
            guidance: classifier-free guidance runs the network twice.
        """
        steps = timesteps if isinstance(timesteps, int) else len(timesteps)
        rows: list[Bits] = [bits] if isinstance(bits, Mapping) else list(bits)
        if not isinstance(bits, Mapping) and len(rows) != steps:
            raise InputError("bits", found=f"{len(rows)} sets", expected=f"one for each of {steps} steps")
        each = [int(value) for value in self.bitops_many(np.array([self.column(row) for row in rows]), convention)]
        total = each[0] * steps if isinstance(bits, Mapping) else sum(each)
        return 2 * total if guidance else total

    def bitops_many(
        self, columns: Integer[np.ndarray, "population genes"], convention: Convention = "image"
    ) -> Int64[np.ndarray, " population"]:
        """Of one image and one step, for many settings at once; columns in the order of `genes`."""
        columns = np.asarray(columns)
        if columns.ndim != 2 or columns.shape[1] != len(self.genes):
            raise InputError("bits", found=columns.shape, expected=f"(population, {len(self.genes)})")
        edge = 2 * len(self.layers)
        scale = 2 if convention == "published" else 1
        macs = [scale * layer.macs for layer in self.layers]
        left, right = [columns[:, 0:edge:2]], [columns[:, 1:edge:2]]
        for place, entry in enumerate(self.attentions):
            at = edge + 4 * place
            macs += [entry.qk, entry.sv]
            left.append(columns[:, [at, at + 3]])
            right.append(columns[:, [at + 1, at + 2]])
        return population_bitops(np.array(macs), np.concatenate(left, 1), np.concatenate(right, 1))

    @property
    def full_precision(self) -> int:
        """BitOps of one image and step with 32 bits everywhere."""
        return int(self.bitops_many(np.full((1, len(self.genes)), FULL_PRECISION))[0])

    @property
    def macs(self) -> int:
        """Of one image and step, attention included."""
        return sum(layer.macs for layer in self.layers) + sum(entry.qk + entry.sv for entry in self.attentions)

    def size_bytes(self, bits: Bits | Sequence[Bits], *, aux_bits: int = 16) -> int:
        """Bytes that are stored: packed weights, their scales and zero points, everything else at `aux_bits`.

        Where every step has its own bits, weights are stored with the largest of them.
        """
        steps = [bits] if isinstance(bits, Mapping) else list(bits)
        size = 0
        for layer in self.layers:
            width = max(step[layer.name]["w"] for step in steps)
            size += -(-layer.weights * width // 8)
            size += -(-layer.channels * layer.halves * (aux_bits + width) // 8)
        rest = self.other_parameters + sum(layer.bias for layer in self.layers)
        return size + -(-rest * aux_bits // 8)

    def read_bytes(self, bits: Bits) -> int:
        """Bytes of packed weights that one step reads."""
        return sum(-(-layer.weights * bits[layer.name]["w"] // 8) for layer in self.layers)

    def table(self, bits: Bits | None = None) -> Table:
        """A row an operation: MACs and, with bits, its bits and share of the BitOps."""
        rows: list[tuple[Any, ...]] = []
        total = None if bits is None else self.bitops(bits)
        for layer in self.layers:
            row: tuple[Any, ...] = (layer.name, layer.macs, layer.weights)
            if bits is not None and total:
                w, a = bits[layer.name]["w"], bits[layer.name]["a"]
                row += (f"w {w}, a {a}", layer.macs * w * a / total)
            rows.append(row)
        for entry in self.attentions:
            row = (entry.name, entry.qk + entry.sv, 0)
            if bits is not None and total:
                given = bits.get(entry.name, {})
                p = given.get("p", self.softmax_bits or FULL_PRECISION)
                own = entry.qk * given["q"] * given["k"] + entry.sv * p * given["v"]
                row += (", ".join(f"{gene} {value}" for gene, value in given.items()), own / total)
            rows.append(row)
        columns = ("operation", "MACs", "weights", *(("bits", "share of BitOps") if bits is not None else ()))
        return Table("cost of one image and step", columns, rows)
