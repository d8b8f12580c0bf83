"""A trained model in, a quantised model out (Q-DiT, arXiv 2406.17343, section 3)."""

import copy
import dataclasses
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from diffusers import ModelMixin
from papercore.errors import InputError
from papercore.progress import track
from papercore.quant import LayerCost, Parameters, RangeObserver, layer_cost
from torch import Tensor, nn

from qdit.calibration import Calibration
from qdit.config import QDiTConfig
from qdit.layers import Backend, QuantLinear
from qdit.rounding import Hessian, SingularHessianError, gptq
from qdit.targets import Target, find_targets, full_weight, install, uninstall

M = TypeVar("M", bound=nn.Module)

BATCH = 16
"""calibration samples a batch: what one update of a static range sees"""


@dataclasses.dataclass(frozen=True)
class LayerRecord:
    """What was done to one layer."""

    name: str
    rows: int
    columns: int
    group_size: int
    short_group: int
    """columns of the last group when the group size does not divide the columns, else 0"""
    bits_per_weight: float
    weight_error: float
    """mean squared change of the weight over its mean square"""
    dead_columns: int
    method: str
    """gptq, nearest, or none (16-bit weights)"""


def quantize(
    model: M,
    config: QDiTConfig,
    calibration: Calibration | None = None,
    *,
    backend: Backend = "auto",
    inplace: bool = False,
) -> M:
    """A quantised copy of `model` (or `model` itself when `inplace`).

    The result carries `qdit_config`, `qdit_targets` and `qdit_records` (what was done to every layer).

    Args:
        model: a diffusers `DiTTransformer2DModel`, or any module with linear layers.
        config: bits, group sizes, methods.
        calibration: inputs of the model; needed for GPTQ and for static activation ranges.
        backend: "simulate" computes with dequantised values, "integer" with codes; "auto" takes integers where they
            were measured to be faster (docs/decisions/0005).

    Raises:
        InputError: see `find_targets`; also weights that are not finite, or missing calibration.
    """
    if backend not in ("auto", "simulate", "integer"):
        raise InputError("backend", found=backend, expected="auto, simulate or integer")
    if config.needs_calibration and calibration is None:
        raise InputError(
            "calibration", found="none", expected="calibration inputs for GPTQ and for static activation ranges"
        )
    targets = find_targets(model, config)
    full = {target.name: full_weight(model, target) for target in targets}
    dtypes = {target.name: model.get_submodule(target.members[0]).weight.dtype for target in targets}
    model = (model if inplace else copy.deepcopy(model)).eval()
    ranges: dict[str, Parameters] = {}
    if config.act == "static" and config.abits < 16:
        assert calibration is not None
        ranges = observe_ranges(model, targets, config, calibration)
    layers = {}
    for target in targets:
        layer = layers[target.name] = install(model, target)
        weight, bias = full[target.name]
        device = weight.device
        layer.to(device)
        if bias is not None:
            layer.bias = nn.Parameter(bias, requires_grad=False)
        if target.name in ranges:
            layer.set_static_range(ranges[target.name])
    rounding = _Rounding(targets, layers, {name: weight for name, (weight, _) in full.items()})
    if config.gptq and config.wbits < 16:
        assert calibration is not None
        records = rounding.gptq(model, calibration)
    else:
        records = [rounding.nearest(target) for target in targets]
    for name, layer in layers.items():
        layer.backend = backend
        layer.to(dtypes[name])  # biases and 16-bit weights; what is quantised is stored as integers
    attach(model, config, targets, records)
    return model


def attach(model: nn.Module, config: QDiTConfig, targets: list[Target], records: list[LayerRecord]) -> None:
    """Notes on the model how it was quantised; on a model of diffusers also so that its own `save_pretrained` writes
    what `qdit.save_pretrained` writes."""
    notes: Any = model
    notes.qdit_config, notes.qdit_targets, notes.qdit_records = config, targets, records
    if isinstance(model, ModelMixin):
        from qdit.hub import attach_quantizer  # which quantises while loading and therefore imports this module

        attach_quantizer(model)
    model.eval()


def observe_ranges(
    model: nn.Module, targets: list[Target], config: QDiTConfig, calibration: Calibration
) -> dict[str, Parameters]:
    """Static range of every group of every layer's input, from the full-precision model (specification 2.5)."""
    observers = {
        target.name: RangeObserver(target.spec.abits, target.spec.group_size)
        for target in targets
        if target.spec.act == "static"
    }
    with _inputs_of(
        model, {target.members[0]: observers[target.name].update for target in targets if target.name in observers}
    ):
        for batch in calibration.batches(BATCH):
            calibration.run(model, batch)
    return {name: observer.parameters() for name, observer in observers.items()}


class _Rounding:
    """Rounds the weights of installed layers."""

    def __init__(self, targets: list[Target], layers: dict[str, QuantLinear], weights: dict[str, Tensor]) -> None:
        self.targets, self.layers, self.weights = targets, layers, weights
        self.hessians: dict[str, Hessian] = {}

    def nearest(self, target: Target) -> LayerRecord:
        return self.round_one(target, None)

    def gptq(self, model: nn.Module, calibration: Calibration) -> list[LayerRecord]:
        """Block after block: the Hessians of a block come from inputs that went through the quantised blocks before
        it, with activation quantisers on; within the block its own weights are still in full precision."""
        records = {}
        blocks = _blocks_of(model, self.targets)
        states = None
        for prefix, block in track(blocks, "GPTQ", len(blocks)):
            chosen = [target for target in self.targets if target.name.startswith(prefix)]
            hessians = {target.name: Hessian(target.columns, self.weights[target.name].device) for target in chosen}
            for target in chosen:
                _use_full_weight(self.layers[target.name], self.weights[target.name])
            hooks = {
                target.name: _quantised_then(self.layers[target.name], hessians[target.name].add) for target in chosen
            }
            if block is None:
                with _inputs_of(model, hooks):
                    for batch in calibration.batches(BATCH):
                        calibration.run(model, batch)
            else:
                if states is None:
                    states = _block_inputs(model, block, calibration)
                with _inputs_of(model, hooks):
                    for arguments, keywords in states:
                        block(*arguments, **keywords)
            self.hessians |= hessians
            for target in chosen:
                records[target.name] = self.round_one(target, hessians[target.name])
            if block is not None and states is not None:
                with torch.no_grad():
                    states = [((block(*args, **keywords), *args[1:]), keywords) for args, keywords in states]
        return [records[target.name] for target in self.targets]

    def round_one(self, target: Target, hessian: Hessian | None) -> LayerRecord:
        method, dead = round_layer(self.layers[target.name], self.weights[target.name], hessian)
        return self.record(target, method, dead)

    def record(self, target: Target, method: str, dead: int) -> LayerRecord:
        layer, weight, spec = self.layers[target.name], self.weights[target.name], target.spec
        error = (layer.dequantized() - weight).square().sum() / weight.square().sum().clamp(min=1e-30)
        bits = 16.0 if spec.wbits == 16 else cost_of(target).bits_per_weight
        short = target.columns % spec.group_size
        return LayerRecord(
            target.name, target.rows, target.columns, spec.group_size, short, bits, float(error), dead, method
        )


def round_layer(layer: QuantLinear, weight: Tensor, hessian: Hessian | None) -> tuple[str, int]:
    """Gives `layer` its weight, rounded with GPTQ where a Hessian is given; the method used and the dead columns."""
    spec = layer.spec
    if hessian is None or spec.wbits == 16:
        layer.round_to_nearest(weight)
        return "none" if spec.wbits == 16 else "nearest", 0
    try:
        result = gptq(
            weight, hessian, spec.wbits, spec.group_size, symmetric=spec.w_sym, scale_dtype=spec.torch_scale_dtype
        )
    except SingularHessianError as error:
        warnings.warn(f"layer {layer.name}: {error}; rounded to nearest instead", stacklevel=2)
        layer.round_to_nearest(weight)
        return "nearest", 0
    codes, parameters = result.codes, Parameters(result.scale, result.zero)
    if spec.w_sym:  # stored as two's complement without zero points
        codes, parameters = codes - 2 ** (spec.wbits - 1), parameters._replace(zero=torch.zeros_like(result.zero))
    layer.set_weight(codes, parameters)
    return "gptq", result.dead_columns


def collect_hessians(model: nn.Module, config: QDiTConfig, calibration: Calibration) -> dict[str, Hessian]:
    """The Hessian of every layer as GPTQ sees it when it quantises a copy of `model` with `config`."""
    targets = find_targets(model, config)
    weights = {target.name: full_weight(model, target)[0] for target in targets}
    biases = {target.name: full_weight(model, target)[1] for target in targets}
    model = copy.deepcopy(model).eval()
    layers = {target.name: install(model, target).to(weights[target.name].device) for target in targets}
    for name, bias in biases.items():
        if bias is not None:
            layers[name].bias = nn.Parameter(bias, requires_grad=False)
    rounding = _Rounding(targets, layers, weights)
    rounding.gptq(model, calibration)
    return rounding.hessians


def cost_of(target: Target) -> LayerCost:
    """What one layer's weight costs to store."""
    spec = target.spec
    scale_bits = 16 if spec.scale_dtype == "float16" else 32
    zero_bits = 0 if spec.w_sym else spec.wbits
    return layer_cost(
        target.rows, target.columns, spec.wbits, spec.group_size, scale_bits=scale_bits, zero_bits=zero_bits
    )


def dequantize(model: M) -> M:
    """A copy of a quantised model with ordinary linear layers that hold the dequantised weights; activations are
    no longer quantised. A fused `qkv` becomes its three layers again, so that the result saves like any model.

    Raises:
        InputError: the model is not quantised.
    """
    model = copy.deepcopy(model)
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, QuantLinear)]
    if not layers:
        raise InputError("the model is not quantised")
    members = {target.name: target.members for target in model.qdit_targets}  # pyright: ignore
    for name, layer in layers:
        uninstall(model, name, members[name], layer.dequantized(), layer.bias)
    if isinstance(model, ModelMixin):
        from qdit.hub import detach_quantizer

        detach_quantizer(model)
    for note in ("qdit_config", "qdit_targets", "qdit_records"):
        if hasattr(model, note):
            delattr(model, note)
    return model


def noise_error(model: nn.Module, quantised: nn.Module, calibration: Calibration) -> float:
    """P: mean squared change of the predicted noise over its mean square, on fixed inputs (specification 2.6)."""
    change = total = 0.0
    for batch in calibration.batches(64):
        before, after = (calibration.run(m, batch).double() for m in (model, quantised))
        change += float((after - before).square().sum())
        total += float(before.square().sum())
    if total == 0:
        raise InputError(
            "calibration", found="no input, or a model that predicts nothing", expected="at least one input"
        )
    return change / total


# ---- running blocks


def _blocks_of(model: nn.Module, targets: list[Target]) -> list[tuple[str, nn.Module | None]]:
    """(name prefix, block) in order; one pseudo-block for a model that is no list of transformer blocks."""
    blocks = getattr(model, "transformer_blocks", None)
    if isinstance(blocks, nn.ModuleList) and all(target.name.startswith("transformer_blocks.") for target in targets):
        return [(f"transformer_blocks.{i}.", block) for i, block in enumerate(blocks)]
    return [("", None)]


class _StopForwardError(Exception):
    """Ends a forward pass at the first block."""


def _block_inputs(model: nn.Module, block: nn.Module, calibration: Calibration) -> list[tuple[tuple, dict]]:
    """What the first block is called with, for every calibration batch."""
    states: list[tuple[tuple, dict]] = []

    def keep(_: nn.Module, arguments: tuple, keywords: dict) -> None:
        states.append((arguments, keywords))
        raise _StopForwardError

    hook = block.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        for batch in calibration.batches(BATCH):
            try:
                calibration.run(model, batch)
            except _StopForwardError:
                continue
    finally:
        hook.remove()
    return states


def _use_full_weight(layer: QuantLinear, weight: Tensor) -> None:
    """Until it is rounded, the layer multiplies with its full-precision weight."""
    layer._cached = (weight.device, weight.dtype, weight)


def _quantised_then(layer: QuantLinear, use: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
    return lambda x: use(layer.quantized_input(x))


@contextmanager
def _inputs_of(model: nn.Module, hooks: dict[str, Callable[[Tensor], None]]) -> Iterator[None]:
    """While the block runs, every named module's input is also given to its function; no gradients are kept."""
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, inputs, use=use: use(inputs[0]))
        for name, use in hooks.items()
    ]
    try:
        with torch.no_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
