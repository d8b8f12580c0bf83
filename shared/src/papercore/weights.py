"""Tensors from files, checked before anything is changed. Only safetensors are read."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from papercore.errors import InputError

COUNTER = "num_batches_tracked"


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        InputError: the file is missing, damaged, or of another format.
    """
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError("weights", where=path, found=str(error), expected="a safetensors file") from error


def load_exactly(model: nn.Module, tensors: Mapping[str, Tensor], where: Path) -> None:
    """Copies `tensors` into `model`, after checking all: the same names and shapes, every value finite.

    Batch-norm's counters of batches may be absent.

    Raises:
        InputError: names the file and the first tensor that does not fit.
    """
    wanted = model.state_dict()
    for name, present in wanted.items():
        if name not in tensors:
            if name.endswith(COUNTER):
                continue
            raise InputError(f"tensor {name}", where=where, found="nothing", expected=f"shape {tuple(present.shape)}")
        tensor = tensors[name]
        if tensor.shape != present.shape:
            raise InputError(
                f"tensor {name}", where=where, found=f"shape {tuple(tensor.shape)}", expected=f"{tuple(present.shape)}"
            )
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise InputError(f"tensor {name}", where=where, found="values that are not finite", expected="numbers")
    for name in tensors:
        if name not in wanted:
            raise InputError(f"tensor {name}", where=where, found="a tensor the model does not have", expected="none")
    model.load_state_dict(dict(tensors), strict=False)
