"""Networks with weights from files."""

from pathlib import Path

import torch
from papercore.weights import load_exactly, read_tensors
from torch import nn

from dpk.networks import create_model


def load_network(name: str, classes: int, weights: Path | None, seed: int = 0) -> nn.Module:
    """A network by name (see `create_model`), with the weights of a safetensors file or fresh ones of a seed.

    Raises:
        InputError: no such network, or weights that do not fit.
    """
    if name.startswith("digits_"):
        from dpk.digits import digits_net

        model: nn.Module = digits_net(name.removeprefix("digits_"), seed)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = create_model(name, classes)
    if weights is not None:
        load_exactly(model, read_tensors(weights), weights)
    return model
