"""The method once more, in slow loops written from its text: what the fast implementation is compared with."""

import copy
import math

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from oneshot_mpq.layers import QuantLayer
from oneshot_mpq.lsq import code_range
from oneshot_mpq.sandwich import Sandwich
from oneshot_mpq.schedule import FreezeScheduler
from oneshot_mpq.supernet import Supernet
from oneshot_mpq.turbulence import turbulence


def slow_turbulence(layer: QuantLayer) -> float:
    """Code by code: weights of a code on the far side of its 0.375 mark, where another code follows."""
    total = 0.0
    weight, bits_now = layer.weight.detach(), layer.allowed_weight_bits
    for bits in bits_now:
        low, high = code_range(bits, signed=True)
        codes, step = layer.weight_quantizer.codes(weight, bits), layer.weight_quantizer.step(bits).detach()
        count = 0
        for code in range(low, high + 1):
            distance = (weight / step)[codes == code] - code
            if code < high:
                count += int((distance > 0.375).sum())
            if code > low:
                count += int((distance < -0.375).sum())
        total += count / weight.numel() / bits
    return total / len(bits_now)


def slow_events(epochs: int) -> list[tuple[int, float]]:
    """The freeze events, from their text."""
    events = []
    for epoch in range(epochs):
        period = 2 if epoch <= int(0.72 * epochs) else 15
        if epoch > 5 and (epoch + 1) % period == 0:
            angle = math.pi * ((epoch - 5) // 2) / (epochs // 2)
            events.append((epoch, 0.2 + 0.15 * (1 + math.cos(angle))))
    return events


def method_difference(net: Supernet, images: Float[Tensor, "n *shape"], labels: Int[Tensor, " n"]) -> dict[str, float]:
    """Largest relative difference of turbulence, freeze events, distortion and loss, in float64, on a trained network
    whose steps are one for a whole tensor."""
    from oneshot_mpq.fit import TrainConfig

    net = copy.deepcopy(net).double().train()
    images = images.double()
    metric = max(
        abs(float(turbulence(layer)) - slow_turbulence(layer)) / max(slow_turbulence(layer), 1e-30)
        for layer in net.layers.values()
    )
    fast, slow = FreezeScheduler(150).events(), slow_events(150)
    apart = [abs(a - b) / b for (_, a), (_, b) in zip(fast, slow, strict=False)]
    events = max(apart) if [e for e, _ in fast] == [e for e, _ in slow] else math.inf

    method = Sandwich(net, TrainConfig(idm=0.01), 1)
    method.begin_step(net, 0)
    losses = [float(loss.detach()) for loss in method.losses(net, (images, labels), torch.Generator())]
    distortion, total = 0.0, 0.0
    names = list(net.layers)

    def outputs(weight_bits: tuple[int, ...], act_bits: tuple[int, ...]) -> tuple[Tensor, dict[str, Tensor]]:
        net.select(weight_bits, act_bits)
        net.features.want(names)
        logits = net(images)
        return logits.detach(), {name: value.detach() for name, value in net.features.collect().items()}

    layers = list(net.layers.values())
    guide, targets = outputs(
        tuple(layer.allowed_weight_bits[-1] for layer in layers),
        tuple(layer.act_choices[-1] for layer in layers),
    )
    for number, path in enumerate(method.paths, start=1):
        logits, found = outputs(*path)
        lowest = [
            n for n, layer, w in zip(names, layers, path.weight_bits, strict=True) if w == layer.allowed_weight_bits[0]
        ]
        moved = sum(float((found[name] - targets[name]).pow(2).mean()) for name in lowest)
        p, q = guide.softmax(1), logits.softmax(1)
        loss = 0.5 * float(functional.nll_loss(q.log(), labels)) + 0.5 * float((p * (p / q).log()).sum(1).mean())
        for layer, bits in zip(layers, path.weight_bits, strict=True):
            if bits == 2:
                step = layer.weight_quantizer.step(2).detach()
                inside = layer.weight.detach().clamp(-2 * step, step)
                loss -= 0.5 * 2.5e-5 * float(inside.pow(2).sum())
        loss += 0.01 * moved
        noted = method.terms[number]
        fast_moved = float(noted["idm"]) if "idm" in noted else 0.0
        distortion = max(distortion, abs(fast_moved - moved) / max(moved, 1e-30) if moved else abs(fast_moved))
        total = max(total, abs(losses[number] - loss) / abs(loss))
    return {"turbulence": metric, "events": events, "distortion": distortion, "loss": total}
