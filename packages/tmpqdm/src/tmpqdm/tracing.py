"""What one forward pass of a network shows: which layers it calls, in which order, and where shortcuts split.

In the decoder of a UNet a residual block receives cat([h, skip]) and maps it with a 1x1 shortcut convolution. The split
point is the number of channels of h, found by comparing the shortcut's input with what was concatenated.
"""

import dataclasses
import re
from collections import Counter
from typing import Any

import torch
from papercore.errors import InputError
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tmpqdm.layers import LAYERS
from tmpqdm.models import Conditions, predict

BLOCKS = ("ResnetBlock2D", "BasicTransformerBlock", "Attention")
"""what is reconstructed as one unit; inside one of them another one is a part of it"""

DECODER_SHORTCUT = re.compile(r"(^|\.)up_blocks\.\d+\.resnets\.\d+\.conv_shortcut$")


@dataclasses.dataclass(frozen=True)
class Trace:
    calls: Counter[str]
    """of every module"""
    units: tuple[str, ...]
    """blocks, and single layers outside of blocks, in the order of their first call"""
    splits: dict[str, int]
    """shortcut -> channels of the main branch"""
    outside: frozenset[str]
    """layers of a block that are also called while the block is not"""
    channels: int
    """of the output"""


def trace(model: nn.Module, x: Tensor, t: Tensor, cond: Conditions) -> Trace:
    """Runs `model` once in evaluation mode.

    Raises:
        InputError: a decoder's shortcut whose input is not a concatenation of two tensors.
    """
    blocks = outermost_blocks(model)
    block_of = {name: block for block in blocks for name, _ in model.named_modules() if name.startswith(f"{block}.")}
    seen = _Seen()
    calls: Counter[str] = Counter()
    order: dict[str, None] = {}
    splits: dict[str, int] = {}
    outside: set[str] = set()
    active: list[str] = []
    handles = []

    def enter(name: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            calls[name] += 1
            active.append(name)
            if isinstance(module, LAYERS):
                block = block_of.get(name)
                if block is None:
                    order[name] = None
                elif block not in active:
                    outside.add(name)
                shortcut = isinstance(module, nn.Conv2d) and (
                    module.kernel_size == (1, 1) or DECODER_SHORTCUT.search(name)
                )
                if shortcut and args and (parts := seen.parts(args[0])) and len(parts) == 2:
                    splits[name] = parts[0]
            elif name in blocks:
                order[name] = None

        return hook

    def leave(*_: Any) -> None:
        active.pop()

    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(enter(name)))
        handles.append(module.register_forward_hook(leave, always_call=True))
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.no_grad(), seen:
            output = predict(model, x, t, cond)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in training.items():
            module.training = mode
    for name, module in model.named_modules():
        if DECODER_SHORTCUT.search(name) and isinstance(module, nn.Conv2d) and calls[name] and name not in splits:
            raise InputError(f"shortcut {name}", found="an input that is no concatenation of two tensors",
                             expected="[main branch, skip branch]", hint="or split_shortcuts=False")  # fmt: skip
    return Trace(calls, tuple(order), splits, frozenset(outside), output.shape[1])


def outermost_blocks(model: nn.Module) -> tuple[str, ...]:
    """Names of the blocks that lie in no other block."""
    found: list[str] = []
    for name, module in model.named_modules():
        if type(module).__name__ in BLOCKS and not any(name.startswith(f"{block}.") for block in found):
            found.append(name)
    return tuple(found)


class _Seen(TorchFunctionMode):
    """Remembers concatenations along the channels; holds their results, so that none is mistaken for a later one."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[Tensor, tuple[int, ...]]] = []

    def parts(self, x: Any) -> tuple[int, ...] | None:
        return next((parts for made, parts in self.made if made is x), None)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in (torch.cat, torch.concat, torch.concatenate):
            tensors = args[0] if args else kwargs["tensors"]
            dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
            if result.ndim == 4 and dim in (1, -3):
                self.made.append((result, tuple(tensor.shape[1] for tensor in tensors)))
        return result
