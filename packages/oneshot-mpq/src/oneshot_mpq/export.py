"""ONNX files with weights of 2, 4 and 8 bits, compared with torch before they are there.

Convolutions and linear layers read their weights through DequantizeLinear, and their inputs through Clip,
QuantizeLinear and DequantizeLinear. Batch norms stay nodes of their own: folded into the weights they would move them
off the one grid that the step spans. Rounding is to the nearest, ties to even, as in training; an integer backend that
rounds ties away from zero gives other codes there.
"""

import copy
import dataclasses
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from papercore.errors import InputError, WorkError
from torch import Tensor, nn

from oneshot_mpq.batchnorm import BatchNormBank
from oneshot_mpq.bitconfig import BitConfig
from oneshot_mpq.layers import QuantLayer
from oneshot_mpq.lsq import FLOAT
from oneshot_mpq.onnx_graph import DOMAIN, ExportGrid, ExportWeight, put_integers, storage_bits
from oneshot_mpq.supernet import Supernet

TRACED = 20
"""opset that torch writes; the later ones used here only add integer types"""
TOLERANCE = 1e-2


@dataclasses.dataclass(frozen=True)
class Exported:
    """A file, and how far its results are from torch's."""

    path: Path
    opset: int
    """21; 25 where weights have 2 bits"""
    weight_bytes: int
    """of the integer weights as they lie in the file: sum of the layers' weights times 2, 4 or 8 bits, each rounded
    up to a byte"""
    nominal_bytes: float
    """what the cost model counts (3 bits as 3, 5 as 5)"""
    file_bytes: int
    """with biases, batch norms, steps (all float32) and the graph"""
    difference: float | None
    """norm of the outputs' difference over the norm of torch's, the graph as it is written; nothing: not checked.
    Sums in another order can move a value over a rounding boundary, so it need not be zero"""
    optimised_difference: float | None
    """the same with onnxruntime's own optimisations"""


def stored_bytes(net: Supernet, config: BitConfig, packed: bool = True) -> int:
    """Bytes of the integer weights in a file, from the layers' sizes alone; layers in floating point count nothing."""
    layers = {**net.layers, **net.fixed}
    widths = {bits.name: bits.weight_bits for bits in (*config.layers, *config.fixed)}
    return sum(
        -(-layers[name].weight.numel() * storage_bits(bits, packed) // 8)
        for name, bits in widths.items()
        if bits < FLOAT
    )


def export_onnx(
    net: Supernet,
    config: BitConfig,
    path: Path | str,
    weight_storage: Literal["packed", "int8"] = "packed",
    check: bool = True,
    *,
    images: Float[Tensor, "n *shape"] | None = None,
    tolerance: float = TOLERANCE,
) -> Exported:
    """Writes the network at these bits, for any batch size, and compares it with torch on batches of 1 and more.

    Recalibrate before. The supernet and its bits stay as they are.

    Args:
        weight_storage: "packed": INT2, INT4 or INT8, whichever holds the bits; "int8": INT8 for every weight.
        images: for the comparison; nothing: random numbers.
        tolerance: largest relative difference of the outputs that is accepted.

    Raises:
        InputError: onnx or onnxruntime is missing, steps are not set, or the configuration is another network's.
        WorkError: onnxruntime gives other outputs, or the weights take other bytes than counted; no file is left.
    """
    try:
        import onnx
        import onnxruntime  # noqa: F401 - said before the work rather than after it
    except ImportError as error:
        raise InputError("onnx", found="not installed", expected="onnx and onnxruntime", hint="extra onnx") from error
    if weight_storage not in ("packed", "int8"):
        raise InputError("weight_storage", found=weight_storage, expected="packed or int8")
    if not net.calibrated:
        raise InputError("the supernet", found="activation steps that were never set", expected="a calibrated one")
    config.check(net)
    path, packed = Path(path), weight_storage == "packed"
    path.parent.mkdir(parents=True, exist_ok=True)
    if images is None:
        images = torch.randn(4, *net.input_shape[1:], generator=torch.Generator().manual_seed(0))
    images = images.detach().float().cpu()
    model, weights = exportable(net, config)
    partial = path.with_name(path.name + ".part")
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # tracing is what is wanted: all shapes but the batch are fixed
            torch.onnx.export(
                model,
                (images[:2],),
                str(partial),
                dynamo=False,
                opset_version=TRACED,
                do_constant_folding=False,
                custom_opsets={DOMAIN: 1},
                input_names=["input"],
                output_names=["output"],
                dynamic_axes={"input": {0: "batch"}, "output": {0: "batch"}},
            )
        written: Any = onnx.load(str(partial))
        total = put_integers(written, weights, packed)
        expected = stored_bytes(net, config, packed)
        if total != expected:
            raise WorkError(f"{path}: weights of {total} bytes, counted were {expected}")
        opset = 25 if any(storage_bits(w.bits, packed) == 2 for w in weights.values()) else 21
        del written.opset_import[:]
        written.opset_import.append(onnx.helper.make_opsetid("", opset))
        written.ir_version = onnx.helper.find_min_ir_version_for(written.opset_import)
        written.producer_name, written.doc_string = "oneshot-mpq", f"{config.model}, {weight_storage} weights"
        onnx.checker.check_model(written)
        onnx.save(written, str(partial))
        exact = optimised = None
        if check:
            exact, optimised = (difference(model, partial, images, level) for level in (False, True))
            if not exact <= tolerance:
                raise WorkError(
                    f"{path}: onnxruntime's outputs differ by {exact:.3g}, at most {tolerance:g} is accepted"
                )
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    nominal = net.cost(config).size_MiB * 2**20
    return Exported(path, opset, total, nominal, path.stat().st_size, exact, optimised)


def exportable(net: Supernet, config: BitConfig) -> tuple[nn.Module, dict[str, ExportWeight]]:
    """A copy with these bits whose quantisers are written as ONNX nodes, and its integer weights by layer."""
    twin = copy.deepcopy(net).cpu().float().eval()
    twin.set_bits(config)
    weights: dict[str, ExportWeight] = {}
    for name, layer in {**twin.layers, **twin.fixed}.items():
        if layer.weight_bits < FLOAT:
            weights[name] = ExportWeight(layer.weight_quantizer, layer.weight.detach(), layer.weight_bits, name)
            layer.weight_quantizer = weights[name]  # pyright: ignore[reportAttributeAccessIssue]
        if layer.act_quantizer is not None and layer.act_bits is not None and layer.act_bits < FLOAT:
            layer.act_quantizer = ExportGrid(layer.act_quantizer, layer.act_bits)  # pyright: ignore[reportAttributeAccessIssue]
        layer.tap = None
    for parent in list(twin.model.modules()):
        if isinstance(parent, QuantLayer):
            continue
        for name, child in list(parent._modules.items()):
            if isinstance(child, BatchNormBank):
                parent._modules[name] = child.plain()
    return twin.model.eval().requires_grad_(False), weights


@torch.no_grad()
def difference(model: nn.Module, path: Path, images: Float[Tensor, "n *shape"], optimised: bool) -> float:
    """Relative norm of what onnxruntime gives less what `model` gives, the worse of one image and of the rest."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    level = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimised else level.ORT_DISABLE_ALL
    session: Any = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    worst = 0.0
    for batch in (images[:1], images[1:]):
        if not len(batch):
            continue
        expected = model(batch)
        found = torch.from_numpy(session.run(None, {"input": batch.numpy()})[0])
        worst = max(worst, float((found - expected).norm() / expected.norm().clamp(min=1e-30)))
    return worst
