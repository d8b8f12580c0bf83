"""The precision solver: one network in which every layer holds a calibrated quantiser for every bit-width.

Calibrated once, it evaluates any mixture of bits by binding other tensors: nothing is quantised again, nothing is
compiled again (TMPQ-DM, arXiv 2404.09532, the precision solver; every uniform setting is an ordinary Q-Diffusion
calibration, arXiv 2302.04304).
"""

import contextlib
import copy
import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.models.attention_processor import Attention
from papercore.errors import InputError
from papercore.quant.affine import code_range
from torch import nn

from tmpqdm import solverfile
from tmpqdm.attention import QuantAttention, check_processor
from tmpqdm.calibration import CalibrationSet
from tmpqdm.fitting import Assignment, Fitter, Settings, unit_errors
from tmpqdm.layers import LAYERS, QuantLayer
from tmpqdm.models import as_example, check_model, example_inputs, predict
from tmpqdm.operations import Pins, operations
from tmpqdm.quantisers import check_menu
from tmpqdm.ranges import RangeMethod, fit_ranges
from tmpqdm.reconstruction import ROUNDING_RATE, STEP_RATE
from tmpqdm.tracing import Trace, trace
from tmpqdm.units import Unit

Bits = Mapping[str, Mapping[str, int]]
"""operation -> gene -> bits, for example {"conv_in": {"w": 8, "a": 6}}"""


@dataclasses.dataclass(frozen=True)
class SolverSettings:
    """What a solver was made with; stored in its file."""

    bits: tuple[int, ...]
    act_symmetric: bool
    softmax_bits: int | Literal["search"] | None
    split_shortcuts: bool
    pin: Pins


class PrecisionSolver:
    """A network that switches between bit-widths without quantising anything again.

    Attributes:
        bits: the menu, descending.
        ops: in pre-order of the modules; an attention before its own projections.
        unused: layers that the model never calls: left as they are, no genes.
        network: called exactly as the model, in evaluation mode; in full precision until `calibrate`, at the largest
            bits after it.
        softmax_bits: of the softmax matrix where it is no gene; None: not quantised, fused attention.
        splits: shortcut -> channels of its main branch.
        calibrated: what `calibrate` was called with, empty before.
    """

    def __init__(self, model: nn.Module, settings: SolverSettings, traced: Trace) -> None:
        """Use `from_model` or `load`."""
        self.settings = settings
        self.bits = settings.bits
        self.softmax_bits = settings.softmax_bits
        self.calibrated: dict[str, Any] = {}
        self.network = copy.deepcopy(model).requires_grad_(False).eval()
        self.splits = dict(traced.splits) if settings.split_shortcuts else {}
        named = dict(model.named_modules())
        layer_names = [name for name, module in named.items() if isinstance(module, LAYERS)]
        self.unused = tuple(name for name in layer_names if not traced.calls[name])
        self.layers: dict[str, QuantLayer] = {}
        self.attentions: dict[str, QuantAttention] = {}
        for name, module in named.items():
            if isinstance(module, LAYERS) and traced.calls[name]:
                layer = QuantLayer(self.network.get_submodule(name), self.splits.get(name))
                self.layers[name] = layer
                self._put(name, layer, model)
            elif isinstance(module, Attention) and traced.calls[name]:
                processor = QuantAttention(settings.softmax_bits is not None)
                self.attentions[name] = processor
                self.network.get_submodule(name).set_processor(processor)  # pyright: ignore[reportCallIssue]
        self.ops = operations(
            named, traced, tuple(self.layers), tuple(self.attentions), settings.softmax_bits == "search", settings.pin
        )
        self.units = self._units(traced)
        self.model_hash = solverfile.model_hash(model)
        self._pinned = {op.name: dict(op.pinned) for op in self.ops}
        self._current: dict[str, dict[str, int]] | None = None

    @classmethod
    def from_model(
        cls,
        model: nn.Module,
        *,
        bits: Sequence[int] = (8, 7, 6, 5),
        act_symmetric: bool = True,
        softmax_bits: int | Literal["search"] | None = 8,
        split_shortcuts: bool = True,
        pin: Pins | None = None,
        example: Any = None,
    ) -> "PrecisionSolver":
        """A solver for a copy of `model`; the model itself is left alone.

        Args:
            bits: menu of 2 to 16 bits, sorted descending.
            act_symmetric: activations symmetric around 0 (all published recipes but text to image) or not.
            softmax_bits: fixed width of the softmax matrix; "search" makes it a gene; None leaves it in floating
                point, and fused attention runs.
            split_shortcuts: quantise the two parts of a decoder shortcut's input alone.
            pin: pattern of operation names (as in file names), or "first" and "last" for the layers called first and
                last on the way of x -> bits of all their genes, or a mapping gene -> bits.
            example: (x, t) or (x, t, cond) for models that are none of diffusers' UNets and DiT.

        Raises:
            InputError: bits, pins or the model do not fit; see `models.check_model`.
        """
        check_model(model)
        menu = check_menu(bits)
        if list(menu) != list(bits):
            warnings.warn(f"bits {list(bits)} sorted to {list(menu)}", stacklevel=2)
        if isinstance(softmax_bits, int):
            code_range(softmax_bits, symmetric=False)
        for name, module in model.named_modules():
            if isinstance(module, Attention):
                check_processor(name, module)
        inputs = example_inputs(model) if example is None else as_example(example)
        settings = SolverSettings(menu, act_symmetric, softmax_bits, split_shortcuts, dict(pin or {}))
        solver = cls(model, settings, trace(model, *inputs))
        if solver.unused:
            warnings.warn(f"layers that are never called have no genes: {', '.join(solver.unused)}", stacklevel=2)
        return solver

    def calibrate(
        self,
        data: CalibrationSet,
        *,
        method: Literal["adaround", "minmax", "mse"] = "adaround",
        weight_iters: int = 20000,
        act_iters: int = 5000,
        batch_size: int = 32,
        prefix: Literal["same", "mixed"] = "same",
        act_range: RangeMethod | None = None,
        rounding_rate: float = ROUNDING_RATE,
        step_rate: float = STEP_RATE,
        mixture: Bits | None = None,
        seed: int = 0,
        progress: Callable[[str], None] | None = None,
        resume: Path | None = None,
    ) -> None:
        """Fits the quantisers of all bits.

        Args:
            data: inputs along sampling trajectories.
            method: "minmax": whole ranges, rounding to nearest; "mse": ranges that lose least; "adaround": whole
                ranges, then learned rounding and learned step sizes.
            weight_iters, act_iters: of minibatch optimisation for every unit and bit-width ("adaround" only).
            batch_size: samples of a minibatch.
            prefix: where the inputs of a unit come from while its rounding is learned: earlier units at the "same"
                bits, or "mixed" ones drawn at random.
            act_range: "max", "mse" or "running" ranges of activations; None: "mse" for that method, else "max".
            rounding_rate, step_rate: Adam's; the defaults are made for thousands of iterations.
            mixture: learn for these bits alone, as one would calibrate a single network, instead of the whole menu in
                turn; all other bits keep their starting values.
            progress: gets a line now and then.
            resume: a folder that keeps finished units; the same call with it goes on where another one ended.

        Raises:
            InputError: the data do not fit the model, or an option is unknown.
        """
        if method not in ("adaround", "minmax", "mse"):
            raise InputError("method", found=method, expected="adaround, minmax or mse")
        if prefix not in ("same", "mixed"):
            raise InputError("prefix", found=prefix, expected="same or mixed")
        if act_range not in (None, "max", "mse", "running"):
            raise InputError("act_range", found=act_range, expected="max, mse or running")
        for name, value in (("weight_iters", weight_iters), ("act_iters", act_iters)):
            if not isinstance(value, int) or value < 0:
                raise InputError(name, found=value, expected="a whole number of at least 0")
        data.validate(self.network, batch_size=batch_size)
        if mixture is not None:
            self.complete(mixture)
        say = progress or (lambda text: None)
        modes = {module: module.training for module in self.network.modules()}
        self.network.eval()
        self._unset()
        try:
            inputs = self._inputs(data)
            widths = self.widths()
            for name, layer in self.layers.items():
                for bits in widths[name, "w"]:
                    layer.round_to_nearest(bits, "mse" if method == "mse" else "max")
            say("ranges of activations")
            fit_ranges(
                self.layers, self.attentions, widths, lambda: self._run(data, batch_size),
                symmetric=self.settings.act_symmetric, method=act_range or ("mse" if method == "mse" else "max"),
            )  # fmt: skip
            if method == "adaround":
                settings = Settings(
                    weight_iters, act_iters, batch_size, prefix, seed, say, resume, rounding_rate, step_rate,
                    learn_softmax=self.softmax_bits == "search",
                )  # fmt: skip
                fitter = Fitter(self.network, self.units, inputs, settings)
                assignments = {f"{bits} bits": self._complete(self.uniform(bits)) for bits in self.bits}
                if mixture is not None:
                    assignments = {"mixture": self._complete(mixture)}
                fitter.weights(assignments)
                fitter.steps(assignments)
        finally:
            self._unset()
            for module, training in modes.items():
                module.training = training
        self.calibrated = {
            "method": method, "weight_iters": weight_iters, "act_iters": act_iters, "batch_size": batch_size,
            "prefix": prefix, "rounding_rate": rounding_rate, "step_rate": step_rate, "act_range": act_range,
            "seed": seed, "samples": len(data.x),
        }  # fmt: skip
        self.set_uniform(self.bits[0])

    def set_bits(self, bits: Bits) -> None:
        """Switches the named operations; the others keep their bits.

        Pinned genes may be left out, or given with their own value. Before the first switch after `full_precision` or
        `calibrate`, the others are at the largest bits.

        Raises:
            InputError: unknown operation or gene, bits that are not on the menu, other bits for a pinned gene, or
                the solver is not calibrated.
        """
        self._ready()
        self._check(bits)
        if self._current is None:
            self._switch(self._complete(self.uniform(self.bits[0])))
        assert self._current is not None
        for name, genes in bits.items():
            self._current[name].update(genes)
            (self.layers.get(name) or self.attentions[name]).use(**self._current[name])

    def set_uniform(self, bits: int) -> None:
        """Every gene that is not pinned to `bits`."""
        self.set_bits(self.uniform(bits))

    def uniform(self, bits: int) -> dict[str, dict[str, int]]:
        """The bits that `set_uniform` sets, complete, pinned ones included."""
        if bits not in self.bits:
            raise InputError("bits", found=bits, expected=f"one of {list(self.bits)}")
        return {op.name: {gene: op.pinned.get(gene, bits) for gene in op.genes} for op in self.ops}

    @property
    def current(self) -> dict[str, dict[str, int]] | None:
        """The complete bits of all genes; None in full precision."""
        if self._current is None:
            return None
        return {op.name: {gene: self._current[op.name][gene] for gene in op.genes} for op in self.ops}

    @contextlib.contextmanager
    def full_precision(self) -> Iterator[nn.Module]:
        """The network without quantisation; the bits come back afterwards."""
        before = self._current
        self._unset()
        try:
            yield self.network
        finally:
            if before is not None:
                self._switch(before)

    def apply(self, plan: Any) -> nn.Module:
        """A network at the bits of a plan, independent of this solver, that fits where the model fitted.

        Args:
            plan: a mapping of bits for every operation, or anything with `bits` and perhaps `per_step_bits` (entries
                with `timestep` and `bits`): then the network switches by the timestep it gets.

        Raises:
            InputError: an operation is missing, or see `set_bits`.
        """
        from tmpqdm.applied import at_bits, by_timestep

        self._ready()
        per_step = getattr(plan, "per_step_bits", None)
        if per_step:
            return by_timestep(self, {int(step["timestep"]): step["bits"] for step in per_step})
        return at_bits(self, plan if isinstance(plan, Mapping) else plan.bits)

    def complete(self, bits: Bits) -> dict[str, dict[str, int]]:
        """Checked bits of every operation, with pinned genes and the fixed softmax bits.

        Raises:
            InputError: an operation or gene is missing, or see `set_bits`.
        """
        self._check(bits)
        for op in self.ops:
            missing = [g for g in op.genes if g not in op.pinned and g not in bits.get(op.name, {})]
            if missing:
                raise InputError(f"bits of {op.name}", found=f"no {', '.join(missing)}", expected=", ".join(op.genes))
        return self._complete(bits)

    def errors(self, data: CalibrationSet, bits: Bits, *, batch_size: int = 32) -> dict[str, float]:
        """Relative squared error of every unit's output at `bits`, everything before it quantised as well."""
        self._ready()
        complete = self.complete(bits)
        before, modes = self._current, {module: module.training for module in self.network.modules()}
        self.network.eval()
        try:
            return unit_errors(self.network, self.units, self._inputs(data), complete, batch_size)
        finally:
            for module, training in modes.items():
                module.training = training
            self._unset()
            if before is not None:
                self._switch(before)

    def widths(self) -> dict[tuple[str, str], tuple[int, ...]]:
        """(operation, gene) -> the bits it has quantisers for."""
        widths = {
            (op.name, gene): (op.pinned[gene],) if gene in op.pinned else self.bits
            for op in self.ops
            for gene in op.genes
        }
        if isinstance(self.softmax_bits, int):
            widths |= {(name, "p"): (self.softmax_bits,) for name in self.attentions}
        return widths

    def save(self, path: Path) -> None:
        """Writes all quantisers, without the weights; see `solverfile`."""
        solverfile.save(self, Path(path))

    @classmethod
    def load(cls, path: Path, model: nn.Module, *, example: Any = None) -> "PrecisionSolver":
        """A calibrated solver for `model` from the file of `save`.

        Raises:
            InputError: the file is damaged or belongs to another model; names the first things that differ.
        """
        return solverfile.load(cls, Path(path), model, example)

    # ---- inside

    def _units(self, traced: Trace) -> tuple[Unit, ...]:
        units = []
        for name in traced.units:
            layers = {key: v for key, v in self.layers.items() if key == name or key.startswith(f"{name}.")}
            attentions = {key: v for key, v in self.attentions.items() if key == name or key.startswith(f"{name}.")}
            if layers:
                outside = frozenset(layers) & traced.outside
                units.append(Unit(name, self.network.get_submodule(name), layers, attentions, outside))
        return tuple(units)

    def _put(self, name: str, layer: QuantLayer, model: nn.Module) -> None:
        """Under every name that the layer has; one layer that is reachable on two ways stays one."""
        original = model.get_submodule(name)
        for alias, module in model.named_modules(remove_duplicate=False):
            if module is original:
                parent, _, leaf = alias.rpartition(".")
                setattr(self.network.get_submodule(parent), leaf, layer)

    def _ready(self) -> None:
        if not self.calibrated:
            raise InputError("solver", found="not calibrated", expected="calibrate() or load() first")

    def _check(self, bits: Bits) -> None:
        for name, genes in bits.items():
            pinned = self._pinned.get(name)
            if pinned is None:
                raise InputError(
                    f"operation {name}", found="no operation of the model", expected=f"one of {len(self.ops)}"
                )
            part = self.layers.get(name) or self.attentions[name]
            for gene, width in genes.items():
                if gene == "p" and name in self.attentions and width == self.softmax_bits:
                    continue
                if gene not in part.bits or (gene == "p" and self.softmax_bits != "search"):
                    raise InputError(f"gene {gene} of {name}", found=width, expected=f"one of {', '.join(part.bits)}")
                if gene in pinned and width != pinned[gene]:
                    raise InputError(
                        f"{gene} bits of {name}", found=width, expected=f"{pinned[gene]}, where they are pinned"
                    )
                if gene not in pinned and width not in self.bits:
                    raise InputError(f"{gene} bits of {name}", found=width, expected=f"one of {list(self.bits)}")

    def _complete(self, bits: Bits) -> dict[str, dict[str, int]]:
        fixed = {"p": self.softmax_bits} if isinstance(self.softmax_bits, int) else {}
        return {
            op.name: {**bits.get(op.name, {}), **op.pinned, **(fixed if op.kind == "attention" else {})}
            for op in self.ops
        }

    def _switch(self, bits: Assignment) -> None:
        for name, genes in bits.items():
            (self.layers.get(name) or self.attentions[name]).use(**genes)
        self._current = {name: dict(genes) for name, genes in bits.items()}

    def _unset(self) -> None:
        for layer in self.layers.values():
            layer.use()
        for attention in self.attentions.values():
            attention.use(**dict.fromkeys(attention.genes))
        self._current = None

    def _inputs(self, data: CalibrationSet) -> tuple[Any, Any, dict[str, Any]]:
        parameter = next(self.network.parameters())
        x = data.x.to(parameter.device, parameter.dtype)
        return x, data.t.to(parameter.device), {name: value.to(parameter.device) for name, value in data.cond.items()}

    def _run(self, data: CalibrationSet, batch_size: int) -> None:
        x, t, cond = self._inputs(data)
        for begin in range(0, len(x), batch_size):
            rows = slice(begin, begin + batch_size)
            with torch.no_grad():
                predict(self.network, x[rows], t[rows], {name: value[rows] for name, value in cond.items()})
