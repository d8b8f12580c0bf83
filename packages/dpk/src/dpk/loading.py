"""Networks and data sets from what a command is given."""

from pathlib import Path
from typing import Any

import torch
from papercore.errors import InputError
from papercore.weights import load_exactly, read_tensors
from torch import Tensor, nn

from dpk.data import Normalise, Pictures, Source, normalisation, read
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


def load_data(
    source: Source, data: Path | None, *, size: int | None = None, limit: int | None = None
) -> tuple[Pictures, Pictures, Normalise, Tensor]:
    """(training part, test part, how they are prepared, an example input of two images).

    Args:
        limit: take no more than so many of each part.

    Raises:
        InputError: see `dpk.data.read`.
    """
    if limit is not None and limit < 1:
        raise InputError("--limit", found=limit, expected="at least 1")
    parts = [read(source, data, part, size=size) for part in ("train", "test")]
    if limit is not None:
        parts = [Pictures(part.images[:limit], part.labels[:limit], part.names) for part in parts]
    prepare = normalisation(source, parts[0].images.shape[-1])
    example = prepare(parts[0].images[:2], None)
    return parts[0], parts[1], prepare, example


def batches_of(part: Pictures, prepare: Normalise, size: int) -> Any:
    """The images of a part as networks take them, a batch at a time."""
    for images in part.images.split(size):
        yield prepare(images, None)
