"""Multiply-accumulates of a network, found by running it once, and the BitOps that follow from them.

One MAC of a weight (or left operand) of w bits and an activation (or right operand) of a bits counts w a BitOps.
Counted: convolutions and linear layers (positions x weights that each position meets) and the two products of
attention. Not counted: biases, normalisation, activation functions, softmax, additions, resampling, and the repetition
of a module on the very tensors it has already been called with (diffusers' DiT embeds its conditions twice).
"""

import dataclasses
import math
import weakref
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Int64, Integer
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from papercore.errors import InputError

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
MATMULS = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm)
ADDED_MATMULS = (torch.baddbmm, Tensor.baddbmm)
FUNCTIONAL = (F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


@dataclasses.dataclass(frozen=True)
class Operation:
    """One layer, or one of the two products of an attention."""

    name: str
    """of the module; the two products carry the name of the module that computes them"""
    kind: Literal["conv", "linear", "qk", "sv"]
    macs: int
    """for one sample and one forward pass, all calls together"""
    weight_shape: tuple[int, ...] | None
    """None for a product"""
    calls: int
    """without repetitions on the same tensors"""


@dataclasses.dataclass(frozen=True)
class Trace:
    """What one forward pass did."""

    operations: tuple[Operation, ...]
    """in the order of `named_modules`, a module's own products before its parts"""
    unused: tuple[str, ...]
    """layers that were never called"""
    uncounted: tuple[str, ...]
    """modules that call a linear map or a convolution as a function, with weights of their own: not counted"""

    @property
    def macs(self) -> int:
        return sum(operation.macs for operation in self.operations)


def trace(model: nn.Module, *args: Any, **kwargs: Any) -> Trace:
    """Runs the model once, in evaluation mode and without gradients, and counts.

    Args:
        args, kwargs: of the model. The leading dimension of the first tensor is the batch; counts are divided by it.
            On the meta device nothing is computed.

    Raises:
        InputError: no tensor among the arguments, or an operation does not divide by the batch.
    """
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.ndim > 0]
    if not tensors:
        raise InputError("arguments of the model", found="no tensor", expected="at least one, batch first")
    batch = len(tensors[0])
    recorder = _Recorder(model)
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.no_grad(), recorder:
            model(*args, **kwargs)
    finally:
        recorder.remove()
        for module, training in modes.items():
            module.training = training

    operations = []
    for name, module in model.named_modules():
        kinds = ("conv" if not isinstance(module, nn.Linear) else "linear",) if isinstance(module, LAYERS) else ()
        for kind in (*kinds, "qk", "sv"):
            macs, calls = recorder.macs[name, kind], recorder.calls[name, kind]
            if not calls:
                continue
            if macs % batch:
                raise InputError(f"{kind} of {name or 'the model'}", found=f"{macs} MACs for a batch of {batch}",
                                 expected="the same work for every sample", hint="trace with one sample")  # fmt: skip
            shape = tuple(module.weight.shape) if isinstance(module, LAYERS) else None
            operations.append(Operation(name, kind, macs // batch, shape, calls))
    layers = [name for name, module in model.named_modules() if isinstance(module, LAYERS)]
    called = {operation.name for operation in operations}
    return Trace(
        tuple(operations), tuple(name for name in layers if name not in called), tuple(sorted(recorder.uncounted))
    )


def bitops(
    macs: Integer[np.ndarray, " ops"],
    left_bits: Integer[np.ndarray, "*population ops"],
    right_bits: Integer[np.ndarray, "*population ops"],
) -> Int64[np.ndarray, "*population"]:
    """sum over operations of MACs x left bits x right bits, for one configuration or many at once, exact.

    Raises:
        InputError: a sum does not fit 63 bits.
    """
    macs, left, right = (np.asarray(values, np.int64) for values in (macs, left_bits, right_bits))
    largest = int(left.max(initial=0)) * int(right.max(initial=0)) * sum(map(int, macs))
    if largest > np.iinfo(np.int64).max:
        raise InputError("BitOps", found=f"up to {largest:.3g}", expected="below 2^63")
    return np.asarray((left * right) @ macs, np.int64)


class _Recorder(TorchFunctionMode):
    """Sees every layer through hooks and every product through the functions that compute it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.macs: Counter[tuple[str, str]] = Counter()
        self.calls: Counter[tuple[str, str]] = Counter()
        self.uncounted: set[str] = set()
        self.products: defaultdict[str, int] = defaultdict(int)
        self.inside: list[tuple[str, nn.Module]] = []
        self.repeating: list[bool] = []
        """of every module entered: whether it, or one around it, repeats an earlier call"""
        self.called: defaultdict[str, list[tuple[weakref.ref[Tensor], ...]]] = defaultdict(list)
        """the tensors of every call; weak, so that activations are freed as usual"""
        self.handles = []
        for name, module in model.named_modules():
            self.handles.append(module.register_forward_pre_hook(self.enter(name), with_kwargs=True))
            self.handles.append(module.register_forward_hook(self.leave(name), always_call=True))

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def enter(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            repeated = bool(tensors) and any(
                len(call) == len(tensors) and all(ref() is value for ref, value in zip(call, tensors, strict=True))
                for call in self.called[name]
            )
            self.called[name].append(tuple(map(weakref.ref, tensors)))
            self.inside.append((name, module))
            self.repeating.append(repeated or bool(self.repeating and self.repeating[-1]))

        return hook

    def leave(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(module, LAYERS) and isinstance(output, Tensor):
                # every output value of a layer meets the weights of its row; of a transposed one, every input value
                ends = args[0] if isinstance(module, TRANSPOSED) and args else output
                macs = ends.numel() * math.prod(module.weight.shape[1:])
                self.count(name, "linear" if isinstance(module, nn.Linear) else "conv", macs)
            self.inside.pop()
            self.repeating.pop()

        return hook

    def count(self, name: str, kind: str, macs: int) -> None:
        if self.repeating and self.repeating[-1]:
            return
        self.macs[name, kind] += macs
        self.calls[name, kind] += 1

    def product(self, macs: int) -> None:
        name = self.inside[-1][0] if self.inside else ""
        self.count(name, "sv" if self.products[name] % 2 else "qk", macs)
        self.products[name] += 1

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            given = dict(zip(("query", "key", "value"), args, strict=False)) | dict(kwargs)
            query, key, value = given["query"], given["key"], given["value"]
            pairs = query.numel() // query.shape[-1] * key.shape[-2]
            self.product(pairs * query.shape[-1])
            self.product(pairs * value.shape[-1])
            with torch._C.DisableTorchFunction():  # its own products are counted
                return func(*args, **kwargs)
        result = func(*args, **kwargs)
        operands: tuple[Any, ...] = ()
        if func in MATMULS:
            operands = tuple(args[:2])
        elif func in ADDED_MATMULS:
            operands = tuple(args[1:3])
        if len(operands) == 2 and all(isinstance(operand, Tensor) and operand.ndim > 1 for operand in operands):
            if any(isinstance(operand, nn.Parameter) for operand in operands):
                self.uncounted.add(self.inside[-1][0] if self.inside else "")
            else:
                self.product(result.numel() * operands[0].shape[-1])
        elif func in FUNCTIONAL and not (self.inside and isinstance(self.inside[-1][1], LAYERS)):
            self.uncounted.add(self.inside[-1][0] if self.inside else "")
        return result
