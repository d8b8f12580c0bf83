"""A convolution or linear layer whose weight and input are quantised at bits that can change from call to call."""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Bool, Float
from papercore.errors import InputError
from torch import Tensor, nn
from torch.nn import functional

from oneshot_mpq.batchnorm import BatchNormBank
from oneshot_mpq.features import Features
from oneshot_mpq.lsq import FLOAT, LSQ


def pads_itself(module: nn.Module) -> bool:
    """Whether it is timm's Conv2dSame; timm is only loaded (which takes seconds) when the model came from there."""
    if not type(module).__module__.startswith("timm."):
        return False
    from timm.layers.conv2d_same import Conv2dSame

    return type(module).forward is Conv2dSame.forward


def supported(module: nn.Module) -> bool:
    """Whether the layer's forward pass is one we know: a subclass that changes its weight first is not."""
    return type(module).forward in (nn.Conv2d.forward, nn.Linear.forward) or pads_itself(module)


class QuantLayer(nn.Module):
    """See the module.

    Args:
        layer: its weight and bias become this layer's, not copies of them.
        weight_choices, act_choices: candidate bits in ascending order; no act_choices: the input stays as it is.
        depthwise: whether the layer convolves every channel on its own.
        act_signed: whether the input's codes may be negative.
        per_channel: a weight step for every output channel instead of one.
    """

    weight_allowed: Bool[Tensor, " weight_choices"]
    _shape: Any

    def __init__(
        self,
        layer: nn.Conv2d | nn.Linear,
        weight_choices: tuple[int, ...],
        act_choices: tuple[int, ...] | None,
        *,
        depthwise: bool = False,
        act_signed: bool = False,
        per_channel: bool = False,
        symmetric: bool = False,
        gradient_scaling: bool = False,
    ) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.kind = "conv" if isinstance(layer, nn.Conv2d) else "linear"
        self.weight_choices = weight_choices
        self.act_choices: tuple[int, ...] = act_choices or ()
        self.depthwise = depthwise
        self.padded = pads_itself(layer)
        """whether it pads its input as TensorFlow does, depending on its size"""
        shape = copy.copy(layer)  # strides, padding and so on, without weights; no part of this module
        shape._parameters = dict.fromkeys(layer._parameters)
        object.__setattr__(self, "_shape", shape)
        place: dict[str, Any] = {"device": layer.weight.device, "dtype": layer.weight.dtype}
        options: dict[str, Any] = {"symmetric": symmetric, "gradient_scaling": gradient_scaling, **place}
        channels = len(layer.weight) if per_channel else None
        self.weight_quantizer = LSQ(weight_choices, True, channels=channels, **options)
        self.weight_quantizer.initialise_weight(layer.weight)
        self.act_quantizer = None if act_choices is None else LSQ(act_choices, act_signed, **options)
        self.register_buffer("weight_allowed", torch.ones(len(weight_choices), dtype=torch.bool))
        self.allowed_weight_bits = weight_choices
        """candidates now; freezing takes the lowest away"""
        self.weight_bits = weight_choices[-1]
        self.act_bits: int | None = None if act_choices is None else act_choices[-1]
        self.name = ""
        self.tap: Features | None = None
        self._bank: tuple[BatchNormBank, ...] = ()

    @property
    def batchnorm(self) -> BatchNormBank | None:
        """The bank behind the layer; it lies in the network at its own place."""
        return self._bank[0] if self._bank else None

    def follow(self, bank: BatchNormBank) -> None:
        """Names the bank behind the layer; a tuple keeps it from becoming a part of this module."""
        self._bank = (bank,)

    def select(self, weight_bits: int, act_bits: int | None) -> None:
        """The bits in use from now on, here and in the bank; not checked."""
        self.weight_bits, self.act_bits = weight_bits, act_bits
        if self._bank and act_bits is not None:
            self._bank[0].select(weight_bits, act_bits)

    def allow(self, bits: Iterable[int]) -> None:
        """Sets the weight candidates of now.

        Raises:
            InputError: none, or one that the layer does not have.
        """
        chosen = set(bits)
        if not chosen or not chosen <= set(self.weight_choices):
            raise InputError(f"weight bits of {self.name}", found=sorted(chosen), expected=f"of {self.weight_choices}")
        self.weight_allowed.copy_(torch.tensor([b in chosen for b in self.weight_choices]))
        self.allowed_weight_bits = tuple(sorted(chosen))

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        allowed = self.weight_allowed.tolist()
        self.allowed_weight_bits = tuple(b for b, yes in zip(self.weight_choices, allowed, strict=True) if yes)

    def quantised_weight(self) -> Float[Tensor, "out *rest"]:
        """The weight at the bits in use, with gradient."""
        return self.weight_quantizer(self.weight, self.weight_bits)

    def forward(self, x: Tensor) -> Tensor:
        if self.act_quantizer is not None and self.act_bits is not None and self.act_bits < FLOAT:
            x = self.act_quantizer(x, self.act_bits)
        weight = self.quantised_weight() if self.weight_bits < FLOAT else self.weight
        shape: Any = self._shape
        if self.kind == "linear":
            y = functional.linear(x, weight, self.bias)
        elif self.padded:
            from timm.layers.conv2d_same import conv2d_same

            y = conv2d_same(x, weight, self.bias, shape.stride, shape.padding, shape.dilation, shape.groups)
        else:
            y = shape._conv_forward(x, weight, self.bias)
        if self.tap is not None and not self._bank:
            self.tap.take(self.name, y)
        return y

    @torch.no_grad()
    def plain(self) -> nn.Conv2d | nn.Linear:
        """An ordinary layer with a copy of the float weight and bias."""
        layer = copy.copy(self._shape)
        layer._parameters = {
            name: None if value is None else nn.Parameter(value.detach().clone())
            for name, value in (("weight", self.weight), ("bias", self.bias))
        }
        return layer.train(self.training)

    def extra_repr(self) -> str:
        return f"{self._shape!r}, W{self.weight_bits}A{self.act_bits}"
