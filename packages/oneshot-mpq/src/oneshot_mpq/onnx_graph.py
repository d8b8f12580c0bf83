"""Quantised layers as ONNX nodes: what the exporter writes for them, and integer weights put in afterwards."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn

from oneshot_mpq.lsq import FLOAT, LSQ

DOMAIN = "oneshot_mpq.weights"
"""of the marks that stand for weights until their integers are put in"""


def storage_bits(bits: int, packed: bool = True) -> int:
    """Bits that a weight of so many takes in a file: 2, 4, 8, or 32 for floating point.

    ONNX has integers of 2, 4 and 8 bits, so 3 bits lie in 4, and 5 to 7 in 8.
    """
    if bits >= FLOAT:
        return 32
    if not packed:
        return 8
    return next(width for width in (2, 4, 8) if bits <= width)


class _Grid(torch.autograd.Function):
    """Clip where the integer type holds more codes than the bits, then quantise and dequantise."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, low: int, high: int) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return (x / step).clamp(low, high).round() * step

    @staticmethod
    def symbolic(g: Any, x: Any, step: Any, low: int, high: int) -> Any:
        kind = torch.int8 if low < 0 else torch.uint8
        limits = torch.iinfo(kind)
        clipped = x
        if (low, high) != (limits.min, limits.max):
            clipped = g.op("Clip", x, g.op("Mul", step, _constant(g, low)), g.op("Mul", step, _constant(g, high)))
        zero = g.op("Constant", value_t=torch.zeros((), dtype=kind))
        codes = g.op("QuantizeLinear", clipped, step, zero)
        return g.op("DequantizeLinear", codes, step, zero).setType(x.type())


def _constant(g: Any, value: int) -> Any:
    return g.op("Constant", value_t=torch.tensor(float(value)))


class ExportGrid(nn.Module):
    """Takes the place of an activation quantiser."""

    step: Float[Tensor, ""]

    def __init__(self, quantizer: LSQ, bits: int) -> None:
        super().__init__()
        self.register_buffer("step", quantizer.step(bits).detach().clone())
        self.low, self.high = quantizer.low(bits), quantizer.high(bits)

    def forward(self, x: Tensor, bits: int) -> Tensor:
        return _Grid.apply(x, self.step, self.low, self.high)  # pyright: ignore[reportReturnType]


class _Mark(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, name: str) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return weight.clone()

    @staticmethod
    def symbolic(g: Any, weight: Any, name: str) -> Any:
        return g.op(f"{DOMAIN}::Weight", weight, name_s=name).setType(weight.type())


class ExportWeight(nn.Module):
    """Takes the place of a weight quantiser; keeps the codes and steps that go into the file."""

    def __init__(self, quantizer: LSQ, weight: Float[Tensor, "out *rest"], bits: int, name: str) -> None:
        super().__init__()
        self.bits, self.name = bits, name
        self.codes: NDArray[np.int8] = quantizer.codes(weight, bits).numpy().astype(np.int8)
        self.step: NDArray[np.float32] = quantizer.step(bits).detach().numpy().copy()

    def forward(self, weight: Tensor, bits: int) -> Tensor:
        step = torch.from_numpy(self.step)
        step = step.reshape(-1, *[1] * (weight.ndim - 1)) if step.ndim else step
        return _Mark.apply(torch.from_numpy(self.codes).to(weight.dtype) * step, self.name)  # pyright: ignore[reportReturnType]


def packed_bytes(codes: NDArray[np.int8], width: int) -> bytes:
    """Codes of 2, 4 or 8 bits, the first in the lowest bits of a byte; the last byte is filled with zeros."""
    each = 8 // width
    flat = codes.reshape(-1).view(np.uint8) & (2**width - 1)
    rows = np.pad(flat, (0, -len(flat) % each)).reshape(-1, each)
    return np.bitwise_or.reduce(rows << (width * np.arange(each, dtype=np.uint8)), axis=1).astype(np.uint8).tobytes()


def put_integers(model: Any, weights: dict[str, ExportWeight], packed: bool) -> int:
    """Replaces every mark of an ONNX model by DequantizeLinear on an integer initialiser; gives their bytes."""
    from onnx import TensorProto, helper

    graph, kinds = model.graph, {2: TensorProto.INT2, 4: TensorProto.INT4, 8: TensorProto.INT8}
    nodes, total = [], 0
    for node in graph.node:
        if node.domain != DOMAIN:
            nodes.append(node)
            continue
        weight = weights[node.attribute[0].s.decode()]
        width = storage_bits(weight.bits, packed)
        raw = packed_bytes(weight.codes, width)
        total += len(raw)
        names = [f"{weight.name}.codes", f"{weight.name}.step"]
        graph.initializer.extend(
            [
                helper.make_tensor(names[0], kinds[width], weight.codes.shape, raw, raw=True),
                helper.make_tensor(names[1], TensorProto.FLOAT, weight.step.shape, weight.step.tobytes(), raw=True),
            ]
        )
        options: dict[str, Any] = {"axis": 0} if weight.step.ndim else {}
        nodes.append(helper.make_node("DequantizeLinear", names, list(node.output), f"{weight.name}.values", **options))
    del graph.node[:]
    graph.node.extend(nodes)
    used = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
    # the float weights behind the marks, and constants that fed them, are read by nothing now
    while True:
        idle = [node for node in graph.node if not used & set(node.output)]
        if not idle:
            break
        for node in idle:
            graph.node.remove(node)
        used = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
    for initializer in [i for i in graph.initializer if i.name not in used]:
        graph.initializer.remove(initializer)
    return total
