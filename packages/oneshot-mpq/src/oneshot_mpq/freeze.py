"""A network with fixed bits, of ordinary modules, from the configuration that is set."""

import copy

import torch
from jaxtyping import Float
from torch import Tensor, nn

from oneshot_mpq.batchnorm import BatchNormBank
from oneshot_mpq.layers import QuantLayer
from oneshot_mpq.lsq import FLOAT
from oneshot_mpq.supernet import Supernet


class Grid(nn.Module):
    """Rounds to k s with low <= k <= high; no gradient.

    Args:
        step: scalar.
    """

    step: Float[Tensor, ""]

    def __init__(self, step: Float[Tensor, ""], low: int, high: int) -> None:
        super().__init__()
        self.register_buffer("step", step.detach().clone())
        self.low, self.high = low, high

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return torch.round(torch.clamp(x / self.step, self.low, self.high)) * self.step

    def extra_repr(self) -> str:
        return f"{self.low}..{self.high}"


@torch.no_grad()
def freeze(net: Supernet) -> nn.Module:
    """A copy of the network at the bits that are set, on the CPU, in evaluation mode: convolutions and linear layers
    whose weights lie on their grids, each behind a `Grid` for its input, and one batch norm where there was a bank.

    Recalibrate before; without gradients its outputs are the supernet's.
    """
    model = copy.deepcopy(net).cpu().eval().model
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if isinstance(child, QuantLayer):
                parent._modules[name] = _frozen(child)
            elif isinstance(child, BatchNormBank):
                parent._modules[name] = child.plain()
    return model.eval().requires_grad_(False)


def _frozen(layer: QuantLayer) -> nn.Module:
    plain = layer.plain()
    if layer.weight_bits < FLOAT:
        plain.weight.copy_(layer.quantised_weight())
    bits, quantizer = layer.act_bits, layer.act_quantizer
    if quantizer is None or bits is None or bits >= FLOAT:
        return plain
    return nn.Sequential(Grid(quantizer.step(bits), quantizer.low(bits), quantizer.high(bits)), plain)
