"""Batch-norm statistics of the configuration that is set (specification of the method, 2.6)."""

from typing import Any

import torch
from papercore.errors import InputError
from torch import nn
from torch.utils.data import DataLoader

from oneshot_mpq.batchnorm import BatchNormBank
from oneshot_mpq.supernet import Supernet


@torch.no_grad()
def recalibrate(net: Supernet, train_loader: DataLoader[Any], images: int = 7000) -> int:
    """Replaces the running statistics of the batch norms in use by plain means over training images.

    Everything else is in evaluation mode meanwhile, and as before afterwards. Gives the number of images seen, whole
    batches.

    Raises:
        InputError: no image.
    """
    norms = [m for m in net.modules() if isinstance(m, BatchNormBank | nn.modules.batchnorm._BatchNorm)]
    modes = {module: module.training for module in net.modules()}
    momenta = [norm.momentum for norm in norms]
    device = next(net.parameters()).device
    seen = 0
    try:
        net.eval()
        for norm in norms:
            norm.training, norm.momentum = True, None
            norm.reset() if isinstance(norm, BatchNormBank) else norm.reset_running_stats()
        for x, *_ in train_loader:
            net(x.to(device))
            seen += len(x)
            if seen >= images:
                break
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, mode in modes.items():
            module.training = mode
    if not seen:
        raise InputError("recalibration images", found="none", expected="at least one batch")
    return seen
