"""Facts about a network, taken from one forward pass: which layers it has, what feeds what, what is negative.

Nothing is concluded from names. A layer is a Conv2d or a Linear that is called; a batch norm belongs to a layer when
it is called once, with the very tensor that the layer gave.
"""

import dataclasses
from collections import Counter
from typing import Any

import torch
from papercore.errors import InputError
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

ATTENTION = (functional.multi_head_attention_forward, torch._native_multi_head_attention)  # pyright: ignore[reportPrivateImportUsage]
"""functions that are given the weights of torch's nn.MultiheadAttention"""


@dataclasses.dataclass(frozen=True)
class Layer:
    """A convolution or linear layer that the forward pass calls."""

    name: str
    module: nn.Conv2d | nn.Linear
    calls: int
    order: int
    """of its first call among the layers"""
    depthwise: bool
    batchnorm: str | None
    """name of the batch norm behind it"""
    minimum: float
    """smallest value of its input over the largest magnitude; 0 if none is negative"""


@dataclasses.dataclass(frozen=True)
class Facts:
    layers: dict[str, Layer]
    """in the order of named_modules"""
    functional: tuple[str, ...]
    """modules that apply a weight of theirs with a function instead of a layer"""
    shared: tuple[str, ...]
    """layers that share their weight with another layer"""

    @property
    def first(self) -> str:
        return min(self.layers.values(), key=lambda layer: layer.order).name

    @property
    def last(self) -> str:
        return max(self.layers.values(), key=lambda layer: layer.order).name


class _Calls(TorchFunctionMode):
    """Notes convolutions and products with a parameter that happen outside of a layer."""

    def __init__(self, stack: list[tuple[str, nn.Module]]) -> None:
        super().__init__()
        self.stack = stack
        self.outside: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (functional.conv2d, functional.linear):
            weight = args[1] if len(args) > 1 else (kwargs or {}).get("weight")
            name, module = self.stack[-1] if self.stack else ("", None)
            if isinstance(weight, nn.Parameter) and not isinstance(module, nn.Conv2d | nn.Linear):
                self.outside.append(name)
        elif func in ATTENTION:
            self.outside.append(self.stack[-1][0] if self.stack else "")
        return func(*args, **(kwargs or {}))


def trace(model: nn.Module, example_input: Tensor) -> Facts:
    """Runs the model once, in evaluation mode, and leaves it as it was.

    Raises:
        InputError: the model does not take the input, or has no layer.
    """
    names = {module: name for name, module in model.named_modules()}
    calls: Counter[str] = Counter()
    order: dict[str, int] = {}
    minimum: dict[str, float] = {}
    outputs: list[tuple[str, Tensor]] = []
    feeds: list[tuple[str, str]] = []
    stack: list[tuple[str, nn.Module]] = []

    def before(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        name = names[module]
        stack.append((name, module))
        if isinstance(module, nn.Conv2d | nn.Linear):
            calls[name] += 1
            order.setdefault(name, len(order))
            x = arguments[0]
            if x.numel() and not x.is_meta:
                least = float(x.detach().min() / x.detach().abs().max().clamp(min=1e-30))
                minimum[name] = min(minimum.get(name, 0.0), least)
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            calls[name] += 1
            feeds.extend((layer, name) for layer, tensor in outputs if tensor is arguments[0])

    def after(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        stack.pop()
        if isinstance(module, nn.Conv2d | nn.Linear):
            outputs.append((names[module], output))

    handles = [module.register_forward_pre_hook(before) for module in names]
    handles += [module.register_forward_hook(after) for module in names]
    training = {module: module.training for module in names}
    noted = _Calls(stack)
    try:
        model.eval()
        with torch.no_grad(), noted:
            model(example_input)
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        raise InputError("example_input", found=str(error), expected="an input that the model takes") from error
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in training.items():
            module.training = mode
    norms = Counter(norm for _, norm in feeds)
    fed = Counter(layer for layer, _ in feeds)
    behind = {layer: norm for layer, norm in feeds if norms[norm] == fed[layer] == calls[norm] == 1}
    layers = {
        name: Layer(
            name,
            module,
            calls[name],
            order[name],
            isinstance(module, nn.Conv2d) and module.groups > 1 and module.weight.shape[1] == 1,
            behind.get(name),
            minimum.get(name, 0.0),
        )
        for module, name in names.items()
        if isinstance(module, nn.Conv2d | nn.Linear) and name in order
    }
    if not layers:
        raise InputError("the model", found="no convolution or linear layer that is called", expected="at least one")
    weights = Counter(id(layer.module.weight) for layer in layers.values())
    shared = tuple(name for name, layer in layers.items() if weights[id(layer.module.weight)] > 1)
    return Facts(layers, tuple(dict.fromkeys(noted.outside)), shared)
