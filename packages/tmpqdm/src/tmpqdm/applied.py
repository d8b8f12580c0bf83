"""Networks at the bits of a plan: copies that hold no other bits, for use in a pipeline."""

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from papercore.errors import InputError
from torch import Tensor, nn

from tmpqdm.attention import QuantAttention
from tmpqdm.layers import QuantLayer

if TYPE_CHECKING:
    from tmpqdm.solver import Bits, PrecisionSolver


def at_bits(solver: "PrecisionSolver", bits: "Bits") -> nn.Module:
    """The solver's network fixed at `bits`."""
    complete = solver.complete(bits)
    made = _copy(solver, [complete])
    _switch(made, complete)
    return made


def by_timestep(solver: "PrecisionSolver", bits: "Mapping[int, Bits]") -> nn.Module:
    """A network that takes the bits of a timestep when it is called with it; one timestep a call.

    The network raises InputError for a timestep that is not in the mapping, or for several in one call.
    """
    table = {t: solver.complete(step) for t, step in bits.items()}
    made = _copy(solver, list(table.values()))
    state: dict[str, int] = {}

    def choose(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        t = args[1] if len(args) > 1 else kwargs["timestep"]
        values = t.reshape(-1) if isinstance(t, Tensor) else torch.tensor([t])
        step = int(values[0])
        if step not in table or (values != step).any():
            raise InputError("timestep", found=values.unique().tolist(), expected=f"one of {sorted(table)}")
        if state.get("step") != step:
            _switch(made, table[step])
            state["step"] = step

    made.register_forward_pre_hook(choose, with_kwargs=True)
    return made


def _copy(solver: "PrecisionSolver", wanted: "Sequence[Mapping[str, Mapping[str, int]]]") -> nn.Module:
    """A deep copy with the quantisers of the wanted bits alone."""
    memo: dict[int, Any] = {}
    for name, layer in solver.layers.items():
        widths = {gene: sorted({bits[name][gene] for bits in wanted}) for gene in ("w", "a")}
        memo |= {
            id(layer.dense): {w: layer.dense[w].clone() for w in widths["w"]},
            id(layer.halves): {w: layer.halves[w] for w in widths["w"]},
            id(layer.steps): {a: layer.steps[a] for a in widths["a"]},
        }
    for name, attention in solver.attentions.items():
        memo[id(attention.steps)] = {
            gene: {bits[name][gene]: attention.steps[gene][bits[name][gene]] for bits in wanted}
            for gene in attention.genes
        }
    with solver.full_precision() as network:
        return copy.deepcopy(network, memo).eval()


def _switch(network: nn.Module, bits: Mapping[str, Mapping[str, int]]) -> None:
    for name, genes in bits.items():
        module: Any = network.get_submodule(name)
        part: QuantLayer | QuantAttention = module if isinstance(module, QuantLayer) else module.processor
        part.use(**genes)
