"""The file of a calibrated solver: safetensors with all quantisers, without the network's weights.

    <layer>/w/<bits>/delta, zero, round      steps and zero points of the output channels; one bit a weight: rounded up?
    <operation>/<gene>/<bits>/delta, zero    of an activation: gene a of a layer, q, k, v, p of an attention
    .../half1/...                            the second half of a split shortcut

The metadata hold the settings, the split points, how it was calibrated, and a hash of the network's float weights: the
rounding bits mean nothing for other weights. A file is checked whole before anything of it is used.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers.models.attention_processor import Attention
from papercore.errors import InputError
from papercore.rundir import atomic
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tmpqdm.layers import LAYERS, QuantLayer, WeightHalf
from tmpqdm.models import as_example, check_model, example_inputs
from tmpqdm.quantisers import Step
from tmpqdm.tracing import trace

if TYPE_CHECKING:
    from tmpqdm.solver import PrecisionSolver

FORMAT, VERSION = "tmpqdm-solver", 1
KEY = "tmpqdm"
"""of the metadata, as JSON"""
SHOWN = 3
"""names in a message"""


def model_hash(model: nn.Module) -> str:
    """Hash of names, shapes and float32 values of the weights of all convolutions and linear layers."""
    digest = hashlib.sha256()
    for name, module in model.named_modules():
        if isinstance(module, LAYERS):
            digest.update(f"{name}{tuple(module.weight.shape)}".encode())
            digest.update(module.weight.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def save(solver: "PrecisionSolver", path: Path) -> None:
    """Raises InputError for a solver that is not calibrated."""
    if not solver.calibrated:
        raise InputError("solver", found="not calibrated", expected="calibrate() first")
    tensors: dict[str, Tensor] = {}
    for key, name, gene, bits, half in _keys(solver):
        if gene == "w":
            weight = solver.layers[name].halves[bits][half]
            tensors |= {f"{key}/delta": weight.delta, f"{key}/zero": weight.zero, f"{key}/round": weight.up}
        else:
            step = _steps(solver, name, gene, bits)[half]
            tensors |= {f"{key}/delta": step.delta, f"{key}/zero": step.zero}
    settings = solver.settings
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "bits": settings.bits,
        "act_symmetric": settings.act_symmetric,
        "softmax_bits": settings.softmax_bits,
        "split_shortcuts": settings.split_shortcuts,
        "pin": settings.pin,
        "splits": solver.splits,
        "operations": {op.name: _shape(solver.layers.get(op.name)) for op in solver.ops},
        "model_hash": solver.model_hash,
        "calibrated": solver.calibrated,
    }
    with atomic(path) as temporary:
        save_file(
            {name: value.detach().cpu().contiguous() for name, value in tensors.items()},
            temporary,
            {KEY: json.dumps(metadata)},  # one entry: the order of several would differ from file to file
        )


def load(cls: "type[PrecisionSolver]", path: Path, model: nn.Module, example: Any) -> "PrecisionSolver":
    """See `PrecisionSolver.load`."""
    from tmpqdm.solver import SolverSettings

    check_model(model)
    metadata, tensors = read(path)
    found_hash, model_s = metadata["model_hash"], model_hash(model)
    settings = SolverSettings(
        tuple(metadata["bits"]),
        metadata["act_symmetric"],
        metadata["softmax_bits"],
        metadata["split_shortcuts"],
        metadata["pin"],
    )
    traced = trace(model, *(example_inputs(model) if example is None else as_example(example)))
    called = {name: module for name, module in model.named_modules() if traced.calls[name]}
    present = {name: _shape(module) for name, module in called.items() if isinstance(module, (*LAYERS, Attention))}
    _compare(path, "operations", metadata["operations"], present)
    solver = cls(model, settings, traced)
    _compare(path, "split points", metadata["splits"], solver.splits)
    if found_hash != model_s:
        raise InputError("model_hash", where=path, found=f"{found_hash[:12]}...",
                         expected=f"{model_s[:12]}..., of the model's weights")  # fmt: skip
    wanted = {}
    for key, name, gene, _, half in _keys(solver):
        if gene == "w":
            weight = solver.layers[name].weights()[half]
            shape = (len(weight), *[1] * (weight.ndim - 1))
            wanted |= {f"{key}/delta": shape, f"{key}/zero": shape, f"{key}/round": (-(-weight.numel() // 8),)}
        else:
            wanted |= {f"{key}/delta": (), f"{key}/zero": ()}
    _compare(path, "tensors", {name: list(value.shape) for name, value in tensors.items()},
             {name: list(shape) for name, shape in wanted.items()})  # fmt: skip
    for name, value in tensors.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise InputError(f"tensor {name}", where=path, found="values that are not finite", expected="numbers")
        if name.endswith("/delta") and not (value > 0).all():
            raise InputError(f"tensor {name}", where=path, found="a step of 0 or less", expected="steps above 0")

    device = next(solver.network.parameters()).device
    done: dict[tuple[str, str, int], list[Any]] = {}
    for key, name, gene, bits, _ in _keys(solver):
        delta, zero = (tensors[f"{key}/{part}"].to(device) for part in ("delta", "zero"))
        made = (
            WeightHalf(delta, zero, tensors[f"{key}/round"])
            if gene == "w"
            else Step(delta, zero, bits, settings.act_symmetric and gene != "p")
        )
        done.setdefault((name, gene, bits), []).append(made)
    for (name, gene, bits), parts in done.items():
        if gene == "w":
            solver.layers[name].set_halves(bits, tuple(parts))
        elif gene == "a":
            solver.layers[name].set_steps(tuple(parts))
        else:
            solver.attentions[name].steps[gene][bits] = parts[0]
    solver.calibrated = metadata["calibrated"]
    solver.set_uniform(solver.bits[0])
    return solver


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metadata and tensors of a solver file.

    Raises:
        InputError: it is no solver file, or of another version.
    """
    try:
        with safe_open(path, "pt") as file:
            stored = (file.metadata() or {}).get(KEY, "{}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError) as error:
        raise InputError("solver", where=path, found=str(error), expected="a file of PrecisionSolver.save") from error
    try:
        values = json.loads(stored)
    except json.JSONDecodeError as error:
        raise InputError("metadata", where=path, found=str(error), expected="JSON") from error
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        found = values.get("format", "nothing") if isinstance(values, dict) else type(values).__name__
        raise InputError("format", where=path, found=found, expected=FORMAT)
    if values.get("version") != VERSION:
        raise InputError("version", where=path, found=values.get("version"), expected=VERSION)
    for name in ("bits", "act_symmetric", "softmax_bits", "split_shortcuts", "pin", "splits", "operations",
                 "model_hash", "calibrated"):  # fmt: skip
        if name not in values:
            raise InputError(f"metadata {name}", where=path, found="nothing", expected="a value")
    return values, tensors


def _keys(solver: "PrecisionSolver") -> Iterator[tuple[str, str, str, int, int]]:
    """(prefix of the tensors' names, operation, gene, bits, half)."""
    for (name, gene), widths in solver.widths().items():
        halves = 2 if name in solver.splits else 1
        for bits in widths:
            for half in range(halves):
                yield f"{name}/{gene}/{bits}" + ("/half1" if half else ""), name, gene, bits, half


def _steps(solver: "PrecisionSolver", name: str, gene: str, bits: int) -> tuple[Step, ...]:
    if gene == "a":
        return solver.layers[name].step_halves(bits)
    return (solver.attentions[name].steps[gene][bits],)


def _shape(module: nn.Module | None) -> list[int] | str:
    if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | QuantLayer):
        return list(module.weight.shape)
    return "attention"


def _compare(path: Path, what: str, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises InputError with the first names that differ."""
    differing = [name for name in (*wanted, *stored) if stored.get(name) != wanted.get(name)]
    if differing:
        names = list(dict.fromkeys(differing))[:SHOWN]
        found = "; ".join(f"{name}: {stored.get(name, 'missing')}" for name in names)
        expected = "; ".join(f"{name}: {wanted.get(name, 'none')}" for name in names)
        raise InputError(f"{what} of another model", where=path, found=found, expected=expected)
