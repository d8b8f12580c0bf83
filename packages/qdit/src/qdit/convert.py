"""A trained model in, a quantised model out (Q-DiT, arXiv 2406.17343, section 3)."""

import copy
from pathlib import Path
from typing import Any, TypeVar

from diffusers import ModelMixin
from papercore.errors import InputError
from papercore.quant import Parameters, RangeObserver
from torch import nn

from qdit.blockwise import BATCH, BlockStore, LayerRecord, Rounding, inputs_of, run_identity
from qdit.calibration import Calibration
from qdit.config import QDiTConfig
from qdit.layers import Backend, QuantLinear
from qdit.rounding import Hessian
from qdit.targets import Target, find_targets, full_weight, install, uninstall

M = TypeVar("M", bound=nn.Module)


def quantize(
    model: M,
    config: QDiTConfig,
    calibration: Calibration | None = None,
    *,
    backend: Backend = "auto",
    inplace: bool = False,
    check_finite: bool = False,
    progress: Path | None = None,
) -> M:
    """A quantised copy of `model` (or `model` itself when `inplace`).

    The result carries `qdit_config`, `qdit_targets` and `qdit_records` (what was done to every layer).

    Args:
        model: a diffusers `DiTTransformer2DModel`, or any module with linear layers.
        config: bits, group sizes, methods.
        calibration: inputs of the model; needed for GPTQ and for static activation ranges.
        backend: "simulate" computes with dequantised values, "integer" with codes; "auto" takes integers where they
            were measured to be faster (docs/decisions/0005).
        check_finite: every quantised layer refuses inputs that are not finite with an InputError that names it; without
            it a token that is not a number comes out as such and touches no other token.
        progress: folder in which GPTQ keeps every finished block; called again with the same model, configuration and
            inputs it goes on from there and gives the same result. The caller removes it.

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
    weights = {name: weight for name, (weight, _) in full.items()}
    rounding = Rounding(targets, layers, weights, config)
    if config.gptq and config.wbits < 16:
        assert calibration is not None
        store = None if progress is None else BlockStore(progress, run_identity(config, weights, calibration))
        records = rounding.gptq(model, calibration, store)
    else:
        records = [rounding.nearest(target) for target in targets]
    for name, layer in layers.items():
        layer.backend, layer.check_finite = backend, check_finite
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
    with inputs_of(
        model, {target.members[0]: observers[target.name].update for target in targets if target.name in observers}
    ):
        for batch in calibration.batches(BATCH):
            calibration.run(model, batch)
    return {name: observer.parameters() for name, observer in observers.items()}


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
    rounding = Rounding(targets, layers, weights, config)
    rounding.gptq(model, calibration)
    return rounding.hessians


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
