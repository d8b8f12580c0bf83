"""A plan's network as files: packed integer weights that load without calibration, and configurations for torchao.

    model.safetensors   <layer>.codes[.half1]   the weight's codes, packed to their bits, one row an output channel
                        <layer>.scale, .zero    float32 and small integers, of the output channels
                        <op>.<gene>.scale, .zero  of an activation
                        <name>                  all that is not quantised: biases, norms, embeddings
    config.json         class and configuration of the model, bits of every operation, split points

The exported network computes the very numbers of the simulated one: (q - z) d with the same q, z and d.
"""

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from papercore.errors import InputError, WorkError
from papercore.quant.packing import pack_codes, unpack_codes
from papercore.rundir import atomic, read_json, write_json
from papercore.weights import read_tensors
from safetensors.torch import save_file
from torch import Tensor, nn

from tmpqdm.attention import QuantAttention
from tmpqdm.layers import QuantLayer
from tmpqdm.models import FAMILIES, Conditions, predict
from tmpqdm.quantisers import Step, check_menu

if TYPE_CHECKING:
    from tmpqdm.solver import Bits, PrecisionSolver

FORMAT, VERSION = "tmpqdm-network", 1
PACKED = 8
"""codes of more bits are stored as whole numbers of 16 bits"""
TORCHAO_FORMAT = "tmpqdm-torchao"


def export(solver: "PrecisionSolver", bits: "Bits", folder: Path, extra: Mapping[str, Any] | None = None) -> int:
    """Writes the network at `bits` to a folder and gives the size of its tensors in bytes.

    Args:
        extra: further entries of config.json, for example the timesteps of the plan.

    Raises:
        InputError: `bits` is not complete, or the solver not calibrated.
    """
    folder = Path(folder)
    network = solver.apply(bits)
    complete = solver.complete(bits)
    tensors: dict[str, Tensor] = {}
    for name, layer in solver.layers.items():
        width = complete[name]["w"]
        for end, half, codes in zip(("", ".half1"), layer.halves[width], layer.codes(width), strict=False):
            rows = codes.reshape(len(codes), -1).to(torch.int32)
            tensors[f"{name}.codes{end}"] = pack_codes(rows, width) if width <= PACKED else rows.to(torch.uint16)
            tensors[f"{name}.scale{end}"] = half.delta.reshape(-1)
            tensors[f"{name}.zero{end}"] = half.zero.reshape(-1).to(torch.uint8 if width <= PACKED else torch.uint16)
        for end, step in zip(("", ".half1"), layer.step_halves(complete[name]["a"]), strict=False):
            tensors |= {f"{name}.a.scale{end}": step.delta, f"{name}.a.zero{end}": step.zero}
    for name, attention in solver.attentions.items():
        for gene in attention.genes:
            step = attention.steps[gene][complete[name][gene]]
            tensors |= {f"{name}.{gene}.scale": step.delta, f"{name}.{gene}.zero": step.zero}
    tensors |= {name: value for name, value in network.state_dict().items() if not _quantised(name, solver)}
    config: Any = getattr(network, "config", None)
    known = type(network).__name__ in FAMILIES
    description = {
        "format": FORMAT,
        "version": VERSION,
        "class": type(network).__name__,
        "config": json.loads(json.dumps({k: v for k, v in dict(config).items() if k[:1] != "_"})) if known else None,
        "bits": complete,
        "act_symmetric": solver.settings.act_symmetric,
        "softmax": solver.softmax_bits is not None,
        "splits": solver.splits,
        "model_hash": solver.model_hash,
        **(extra or {}),
    }
    tensors = {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}
    with atomic(folder / "model.safetensors") as temporary:
        save_file(tensors, temporary)
    write_json(folder / "config.json", description)
    return sum(value.numel() * value.element_size() for value in tensors.values())


def load_exported(folder: Path, model: nn.Module | None = None) -> nn.Module:
    """The network of an exported folder, on the CPU, in evaluation mode.

    Args:
        model: one of the right class for networks that are none of diffusers' UNets and DiT; its weights do not matter.

    Raises:
        InputError: a file is damaged, or the tensors do not fit the network; nothing is half-loaded.
    """
    folder = Path(folder)
    where = folder / "config.json"
    config = read_json(where)
    if not isinstance(config, dict) or config.get("format") != FORMAT or config.get("version") != VERSION:
        found = config.get("format") if isinstance(config, dict) else type(config).__name__
        raise InputError("format", where=where, found=found, expected=f"{FORMAT}, version {VERSION}")
    try:
        bits, splits, softmax = config["bits"], config["splits"], config["softmax"]
        symmetric = config["act_symmetric"]
    except KeyError as error:
        raise InputError(f"key {error.args[0]}", where=where, found="nothing", expected="a value") from error
    network = _skeleton(config, where) if model is None else _copy(model)
    tensors = read_tensors(folder / "model.safetensors")
    left = set(tensors)

    def take(name: str, shape: tuple[int, ...] | None = None) -> Tensor:
        if name not in tensors:
            raise InputError(f"tensor {name}", where=folder / "model.safetensors", found="nothing", expected="a tensor")
        value = tensors[name]
        if shape is not None and tuple(value.shape) != shape:
            raise InputError(f"tensor {name}", where=folder / "model.safetensors",
                             found=f"shape {tuple(value.shape)}", expected=str(shape))  # fmt: skip
        left.discard(name)
        return value

    named = dict(network.named_modules())
    for name, genes in bits.items():
        if name not in named:
            raise InputError(f"operation {name}", where=where, found="bits for it", expected="a module of the network")
        check_menu(set(genes.values()))
        module = named[name]
        if "w" in genes:
            layer = QuantLayer(module, splits.get(name))
            ends = ("",) if layer.split is None else ("", ".half1")
            halves = []
            for end, weight in zip(ends, layer.weights(), strict=True):
                halves.append(_half(take, name, end, weight, genes["w"]))
            layer.set_dense(genes["w"], torch.cat(halves, 1))
            layer.set_steps(tuple(_step(take, f"{name}.a", end, genes["a"], symmetric) for end in ends))
            layer.use(w=genes["w"], a=genes["a"])
            parent, _, leaf = name.rpartition(".")
            setattr(network.get_submodule(parent), leaf, layer)
        else:
            processor = QuantAttention(softmax)
            for gene in processor.genes:
                processor.steps[gene][genes[gene]] = _step(
                    take, f"{name}.{gene}", "", genes[gene], symmetric and gene != "p"
                )
            processor.use(**{gene: genes[gene] for gene in processor.genes})
            module.set_processor(processor)  # pyright: ignore[reportCallIssue]
    with torch.no_grad():
        for name, value in network.state_dict().items():
            if not _inner_weight(name, network):
                value.copy_(take(name, tuple(value.shape)))
    if left:
        raise InputError(f"tensor {min(left)}", where=folder / "model.safetensors", found="a tensor the network does "
                         "not have", expected="none")  # fmt: skip
    for module in network.modules():
        if isinstance(module, QuantLayer):
            module.use(**module.bits)
    return network.eval().requires_grad_(False)


@torch.no_grad()
def check_equal(simulated: nn.Module, exported: nn.Module, inputs: tuple[Tensor, Tensor, Conditions]) -> float:
    """Largest difference of their outputs, as a part of the largest output; 0 on the CPU.

    Raises:
        WorkError: they differ by more than 1e-5.
    """
    expected, found = predict(simulated, *inputs), predict(exported, *inputs)
    difference = float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-12))
    if not difference <= 1e-5:
        raise WorkError(
            f"the exported network's outputs differ from the simulated ones by {difference:.3g} of the largest"
        )
    return difference


def torchao_config(solver: "PrecisionSolver", bits: "Bits") -> dict[str, Any]:
    """A configuration for every linear layer, and the layers torchao leaves alone.

    W8A8 becomes Int8DynamicActivationInt8WeightConfig, other weights with 8-bit activations
    Int8DynamicActivationIntxWeightConfig, all others IntxWeightOnlyConfig: torchao's activations have 8 bits or none.
    """
    complete = solver.complete(bits)
    modules, skipped = {}, []
    for name, layer in solver.layers.items():
        w, a = complete[name]["w"], complete[name]["a"]
        if not isinstance(layer.layer, nn.Linear) or not 2 <= w <= 8:
            skipped.append(name)
        elif a == 8 and w == 8:
            modules[name] = {"config": "Int8DynamicActivationInt8WeightConfig"}
        else:
            kind = "Int8DynamicActivationIntxWeightConfig" if a == 8 else "IntxWeightOnlyConfig"
            modules[name] = {"config": kind, "weight_dtype": f"int{w}", "granularity": "PerAxis(0)"}
    return {"format": TORCHAO_FORMAT, "version": 1, "modules": modules, "not_covered": skipped}


def load_torchao_config(path: Path) -> Any:
    """torchao's `FqnToConfig` for `quantize_(model, config)`, from a file of `torchao_config`.

    Raises:
        InputError: torchao is not installed, or the file is another one.
    """
    stored = read_json(path)
    if not isinstance(stored, dict) or stored.get("format") != TORCHAO_FORMAT:
        raise InputError("format", where=path, found="another file", expected=TORCHAO_FORMAT)
    try:
        quantization = importlib.import_module("torchao.quantization")
    except ImportError as error:
        raise InputError("torchao", found="not installed", expected="torchao 0.18", hint="pip install tmpqdm[torchao]"
                         ) from error  # fmt: skip
    made = {}
    for name, entry in stored["modules"].items():
        options = {}
        if "weight_dtype" in entry:
            options = {
                "weight_dtype": getattr(torch, entry["weight_dtype"]),
                ("weight_granularity" if entry["config"].startswith("Int8") else "granularity"): quantization.PerAxis(
                    0
                ),
            }
        made[name] = getattr(quantization, entry["config"])(**options)
    return quantization.FqnToConfig(made)


def _half(take: Any, name: str, end: str, weight: Tensor, bits: int) -> Tensor:
    """The weight, or a half of it, from the stored codes."""
    rows, columns = len(weight), weight[0].numel()
    packed = take(f"{name}.codes{end}")
    shape = (rows, *[1] * (weight.ndim - 1))
    delta = take(f"{name}.scale{end}", (rows,)).float().reshape(shape)
    zero = take(f"{name}.zero{end}", (rows,)).float().reshape(shape)
    codes = unpack_codes(packed, bits, columns) if bits <= PACKED else packed.to(torch.int32)
    if codes.shape != (rows, columns):
        raise InputError(
            f"tensor {name}.codes{end}", found=f"{tuple(codes.shape)} codes", expected=f"{(rows, columns)}"
        )
    return (codes.float().reshape(weight.shape) - zero) * delta


def _step(take: Any, name: str, end: str, bits: int, symmetric: bool) -> Step:
    return Step(take(f"{name}.scale{end}", ()), take(f"{name}.zero{end}", ()), bits, symmetric)


def _quantised(name: str, solver: "PrecisionSolver") -> bool:
    layer, _, leaf = name.rpartition(".layer.")
    return leaf == "weight" and layer in solver.layers


def _inner_weight(name: str, network: nn.Module) -> bool:
    owner, _, leaf = name.rpartition(".layer.")
    return leaf == "weight" and isinstance(network.get_submodule(owner), QuantLayer)


def _skeleton(config: Mapping[str, Any], where: Path) -> nn.Module:
    import diffusers

    if config.get("class") not in FAMILIES:
        raise InputError("class", where=where, found=config.get("class"), expected=f"one of {', '.join(FAMILIES)}",
                         hint="give the model")  # fmt: skip
    return getattr(diffusers, config["class"]).from_config(config["config"])


def _copy(model: nn.Module) -> nn.Module:
    import copy

    return copy.deepcopy(model)
