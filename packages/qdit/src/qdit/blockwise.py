"""Weights of a whole model rounded, with GPTQ block after block (Q-DiT, arXiv 2406.17343, section 3.1)."""

import dataclasses
import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from papercore.errors import located
from papercore.progress import track
from papercore.quant import LayerCost, Parameters, layer_cost
from papercore.rundir import atomic
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from qdit.calibration import Calibration
from qdit.config import QDiTConfig
from qdit.layers import QuantLinear
from qdit.rounding import Hessian, SingularHessianError, gptq
from qdit.targets import Target

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


class Rounding:
    """Rounds the weights of installed layers."""

    def __init__(
        self, targets: list[Target], layers: dict[str, QuantLinear], weights: dict[str, Tensor], config: QDiTConfig
    ) -> None:
        self.targets, self.layers, self.weights, self.config = targets, layers, weights, config
        self.hessians: dict[str, Hessian] = {}

    def nearest(self, target: Target) -> LayerRecord:
        return self.round_one(target, None)

    def gptq(self, model: nn.Module, calibration: Calibration, store: "BlockStore | None" = None) -> list[LayerRecord]:
        """Block after block: the Hessians of a block come from inputs that went through the quantised blocks before
        it, with activation quantisers on; within the block its own weights are still in full precision."""
        records: dict[str, LayerRecord] = {}
        blocks = blocks_of(model, self.targets)
        states: list[tuple[tuple, dict]] | None = None
        for prefix, block in track(blocks, "GPTQ", len(blocks)):
            chosen = {target.name: target for target in self.targets if target.name.startswith(prefix)}
            layers = {name: self.layers[name] for name in chosen}
            if block is not None and states is None:
                states = block_inputs(model, block, calibration)
            finished = store.read(prefix, layers) if store is not None else None
            if finished is None:
                self.collect(model, block, states, calibration, chosen)
                finished = [self.round_one(target, self.hessians[name]) for name, target in chosen.items()]
                if store is not None:
                    store.write(prefix, layers, finished)
            records |= {record.name: record for record in finished}
            if block is not None and states is not None:
                with torch.no_grad():
                    states = [((block(*args, **keywords), *args[1:]), keywords) for args, keywords in states]
        return [records[target.name] for target in self.targets]

    def collect(
        self,
        model: nn.Module,
        block: nn.Module | None,
        states: "list[tuple[tuple, dict]] | None",
        calibration: Calibration,
        chosen: Mapping[str, Target],
    ) -> None:
        """The Hessian of every chosen layer, from the inputs of its block or of the whole model."""
        hooks = {}
        for name, target in chosen.items():
            self.hessians[name] = Hessian(target.columns, self.weights[name].device)
            _use_full_weight(self.layers[name], self.weights[name])
            hooks[name] = _quantised_then(self.layers[name], self.hessians[name].add)
        with inputs_of(model, hooks):
            if block is None:
                for batch in calibration.batches(BATCH):
                    calibration.run(model, batch)
            for arguments, keywords in states or ():
                assert block is not None
                block(*arguments, **keywords)

    def round_one(self, target: Target, hessian: Hessian | None) -> LayerRecord:
        method, dead = round_layer(self.layers[target.name], self.weights[target.name], hessian, self.config)
        return self.record(target, method, dead)

    def record(self, target: Target, method: str, dead: int) -> LayerRecord:
        layer, weight, spec = self.layers[target.name], self.weights[target.name], target.spec
        error = (layer.dequantized() - weight).square().sum() / weight.square().sum().clamp(min=1e-30)
        bits = 16.0 if spec.wbits == 16 else cost_of(target).bits_per_weight
        short = target.columns % spec.group_size
        return LayerRecord(
            target.name, target.rows, target.columns, spec.group_size, short, bits, float(error), dead, method
        )


def round_layer(layer: QuantLinear, weight: Tensor, hessian: Hessian | None, config: QDiTConfig) -> tuple[str, int]:
    """Gives `layer` its weight, rounded with GPTQ where a Hessian is given; the method used and the dead columns."""
    spec = layer.spec
    if hessian is None or spec.wbits == 16:
        layer.round_to_nearest(weight)
        return "none" if spec.wbits == 16 else "nearest", 0
    try:
        result = gptq(
            weight,
            hessian,
            spec.wbits,
            spec.group_size,
            symmetric=spec.w_sym,
            percdamp=config.percdamp,
            act_order=config.act_order,
            scale_dtype=spec.torch_scale_dtype,
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


def cost_of(target: Target) -> LayerCost:
    """What one layer's weight costs to store."""
    spec = target.spec
    scale_bits = 16 if spec.scale_dtype == "float16" else 32
    zero_bits = 0 if spec.w_sym else spec.wbits
    return layer_cost(
        target.rows, target.columns, spec.wbits, spec.group_size, scale_bits=scale_bits, zero_bits=zero_bits
    )


# ---- running blocks


def blocks_of(model: nn.Module, targets: list[Target]) -> list[tuple[str, nn.Module | None]]:
    """(name prefix, block) in order; one pseudo-block for a model that is no list of transformer blocks."""
    blocks = getattr(model, "transformer_blocks", None)
    if isinstance(blocks, nn.ModuleList) and all(target.name.startswith("transformer_blocks.") for target in targets):
        return [(f"transformer_blocks.{i}.", block) for i, block in enumerate(blocks)]
    return [("", None)]


class _StopForwardError(Exception):
    """Ends a forward pass at the first block."""


def block_inputs(model: nn.Module, block: nn.Module, calibration: Calibration) -> list[tuple[tuple, dict]]:
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
    def give(x: Tensor) -> None:
        with located(f"layer {layer.name}"):
            use(layer.quantized_input(x))

    return give


@contextmanager
def inputs_of(model: nn.Module, hooks: dict[str, Callable[[Tensor], None]]) -> Iterator[None]:
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


# ---- finished blocks on disk


class BlockStore:
    """The finished blocks of a GPTQ run that may be interrupted: one safetensors file a block.

    Args:
        folder: made when the first block is written.
        identity: of the run; what another run has left there is written over.
    """

    def __init__(self, folder: Path, identity: str) -> None:
        self.folder, self.identity = Path(folder), identity

    def _file(self, prefix: str) -> Path:
        return self.folder / f"{prefix or 'model.'}safetensors"

    def read(self, prefix: str, layers: Mapping[str, QuantLinear]) -> list[LayerRecord] | None:
        """Gives the layers of a finished block their weights and tells what was done; None when there is none."""
        try:
            with safe_open(self._file(prefix), framework="pt") as file:
                notes = json.loads((file.metadata() or {})["block"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        except (OSError, SafetensorError, KeyError, ValueError):
            return None
        if notes["run"] != self.identity:
            return None
        for name, layer in layers.items():
            for key, value in layer.named_buffers():
                value.copy_(tensors[f"{name}.{key}"])
            layer.forget()
        return [LayerRecord(**record) for record in notes["records"]]

    def write(self, prefix: str, layers: Mapping[str, QuantLinear], records: Sequence[LayerRecord]) -> None:
        tensors = {
            f"{name}.{key}": value.cpu() for name, layer in layers.items() for key, value in layer.named_buffers()
        }
        notes = {"run": self.identity, "records": [dataclasses.asdict(record) for record in records]}
        with atomic(self._file(prefix)) as temporary:
            save_file(tensors, temporary, metadata={"block": json.dumps(notes)})


def run_identity(config: QDiTConfig, weights: Mapping[str, Tensor], calibration: Calibration) -> str:
    """A digest of everything that the result of GPTQ depends on."""
    digest = hashlib.blake2b(json.dumps(config.to_dict(), sort_keys=True, default=str).encode(), digest_size=16)
    for tensor in (*weights.values(), calibration.x, calibration.t, calibration.y):
        digest.update(str((tensor.dtype, tuple(tensor.shape))).encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]
    return digest.hexdigest()
