"""The parts of the training loss (specification of the method, 2.3). Half-precision values are taken to float32."""

from collections.abc import Iterable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from oneshot_mpq.layers import QuantLayer
from oneshot_mpq.lsq import FLOAT


def wide(x: Tensor) -> Tensor:
    """At least float32."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def distillation(teacher: Float[Tensor, "n classes"], student: Float[Tensor, "n classes"]) -> Float[Tensor, ""]:
    """KL(softmax(teacher) || softmax(student)) at temperature 1, mean over the batch."""
    return functional.kl_div(
        wide(student).log_softmax(-1), wide(teacher).log_softmax(-1), reduction="batchmean", log_target=True
    )


def distortion(features: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> Float[Tensor, ""]:
    """Information distortion: the sum over layers of the mean squared difference to the largest path's output.
    At least one layer."""
    terms = [(wide(value) - wide(teacher[name])).square().mean() for name, value in features.items()]
    return torch.stack(terms).sum()


def region_decay(layers: Iterable[QuantLayer], weight_decay: float, inside: float = 0.0) -> Float[Tensor, ""] | None:
    """R: takes the optimiser's weight decay back inside the clipping range of layers at two bits.

    1/2 (inside - weight_decay) sum of clamp(w, low s, high s)^2, the step without gradient; nothing: no such layer.
    """
    terms = []
    for layer in layers:
        if layer.weight_bits == 2:
            clamped, _ = _clamped(layer)
            terms.append(clamped.square().sum())
    return 0.5 * (inside - weight_decay) * torch.stack(terms).sum() if terms else None


def dampening(layers: Iterable[QuantLayer]) -> Float[Tensor, ""]:
    """D: squared distance of weights to their code's centre, for codes that the lowest allowed grid has too.

    Summed over output channels, mean over the rest of the weight; the gradient reaches the weights only.
    (After Nagel et al., arXiv 2203.11086.)
    """
    terms = []
    for layer in layers:
        bits, lowest = layer.weight_bits, layer.allowed_weight_bits[0]
        if bits >= FLOAT:
            continue
        clamped, step = _clamped(layer)
        codes = (clamped.detach() / step).round()
        distance = (clamped - codes * step).square()
        if bits > lowest:
            ratio = 2 ** (bits - lowest)
            coarse = codes / ratio
            low, high = -(2 ** (lowest - 1)), 2 ** (lowest - 1) - 1
            distance = distance * ((coarse == coarse.round()) & (coarse >= low) & (coarse <= high))
        terms.append(distance.sum() / (distance.numel() / len(distance)))
    return torch.stack(terms).sum() if terms else torch.zeros(())


def _clamped(layer: QuantLayer) -> tuple[Tensor, Tensor]:
    """The weight inside its grid's range, and the step, which gets no gradient."""
    quantizer, bits = layer.weight_quantizer, layer.weight_bits
    step = quantizer.step(bits).detach()
    if quantizer.channels is not None:
        step = step.reshape(-1, *[1] * (layer.weight.ndim - 1))
    return torch.clamp(layer.weight, quantizer.low(bits) * step, quantizer.high(bits) * step), step
