"""Accuracy: of one network, and of all uniform bit-widths while the training goes on."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from oneshot_mpq.batchnorm import BatchNormBank
from oneshot_mpq.supernet import Supernet


@contextmanager
def batch_statistics(net: Supernet) -> Iterator[None]:
    """Inside, batch norms use the statistics of the batch, and afterwards everything is as before."""
    modes = {module: module.training for module in net.modules()}
    buffers = {name: value.clone() for name, value in net.named_buffers()}
    try:
        net.eval()
        for module in net.modules():
            if isinstance(module, BatchNormBank | nn.modules.batchnorm._BatchNorm):
                module.training = True
        yield
    finally:
        for name, value in net.named_buffers():
            value.copy_(buffers[name])
        for module, mode in modes.items():
            module.training = mode


@torch.no_grad()
def accuracies(net: Supernet, loader: DataLoader[Any]) -> dict[int, float]:
    """Top-1 accuracy in percent at every uniform width (depthwise layers: the nearest above), with batch statistics.

    The bits that were set are set again afterwards.
    """
    layers = list(net.layers.values())
    before = [(layer.weight_bits, layer.act_bits) for layer in layers]
    device = next(net.parameters()).device
    right, count = dict.fromkeys(net.bits, 0), 0
    with batch_statistics(net):
        for x, y in loader:
            x, y = x.to(device), y.to(device)
            count += len(y)
            for bits in net.bits:
                for layer in layers:
                    w = min(b for b in layer.weight_choices if b >= bits)
                    layer.select(w, min(b for b in layer.act_choices if b >= bits))
                right[bits] += int((net(x).argmax(-1) == y).sum())
    for layer, (w, a) in zip(layers, before, strict=True):
        layer.select(w, a)
    return {bits: 100 * hits / max(1, count) for bits, hits in right.items()}


@torch.no_grad()
def accuracy(model: nn.Module, loader: DataLoader[Any]) -> float:
    """Top-1 accuracy in percent, in evaluation mode, over every image of the loader."""
    training, device = model.training, next(model.parameters()).device
    model.eval()
    right, count = 0, 0
    for x, y in loader:
        right += int((model(x.to(device)).argmax(-1) == y.to(device)).sum())
        count += len(y)
    model.train(training)
    return 100 * right / max(1, count)
