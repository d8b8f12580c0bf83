"""A supernet as two files: `supernet.safetensors` (weights, steps, banks, candidate sets) and `supernet.json`."""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from papercore.errors import InputError
from papercore.rundir import atomic, write_json
from papercore.weights import load_exactly, read_tensors
from safetensors.torch import save_file
from torch import nn

from oneshot_mpq.models import build_model
from oneshot_mpq.supernet import Supernet

FORMAT, VERSION = "oneshot-mpq/supernet", 1
TENSORS, NOTES = "supernet.safetensors", "supernet.json"


def save_supernet(
    net: Supernet,
    folder: Path | str,
    *,
    architecture: Mapping[str, Any] | None = None,
    notes: Mapping[str, Any] | None = None,
) -> None:
    """Writes both files, each at once or not at all; the JSON last.

    Args:
        architecture: arguments of `models.build_model` that give the float model (name, classes, channels); without
            them `load_supernet` must be given the model.
        notes: kept as they are and given back by `read_notes` (where the data came from, and so on).
    """
    folder = Path(folder)
    tensors = {name: value.detach().cpu().clone().contiguous() for name, value in net.state_dict().items()}
    with atomic(folder / TENSORS) as temporary:
        save_file(tensors, temporary)
    write_json(
        folder / NOTES,
        {
            "format": FORMAT,
            "version": VERSION,
            "name": net.name,
            "architecture": dict(architecture) if architecture is not None else None,
            "input": list(net.input_shape),
            "bits": list(net.bits),
            "fixed": {name: list(bits) for name, bits in net.chosen.items()},
            "act_sign": dict(net.sign),
            "options": dict(net.options),
            "notes": dict(notes or {}),
        },
    )


def read_notes(folder: Path | str) -> dict[str, Any]:
    """The JSON of a saved supernet.

    Raises:
        InputError: missing, damaged, or of another format.
    """
    path = Path(folder) / NOTES
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError("supernet", where=path, found=str(error), expected="a folder that train wrote") from error
    if not isinstance(values, dict) or values.get("format") != FORMAT or values.get("version") != VERSION:
        raise InputError(
            "format",
            where=path,
            found=values.get("format") if isinstance(values, dict) else None,
            expected=f"{FORMAT} {VERSION}",
        )
    for key in ("name", "architecture", "input", "bits", "fixed", "act_sign", "options"):
        if key not in values:
            raise InputError(f"key {key}", where=path, found="nothing", expected="a value")
    return values


def load_supernet(folder: Path | str, model: nn.Module | None = None, *, device: str = "cpu") -> Supernet:
    """The supernet as it was saved, in evaluation mode, at the most bits.

    Args:
        model: the float model (its weights do not matter); nothing: built from the saved name.

    Raises:
        InputError: names the file and the first thing that is missing or does not fit.
    """
    values = read_notes(folder)
    if model is None:
        if values["architecture"] is None:
            raise InputError(
                "model", where=Path(folder) / NOTES, found="none saved", expected="the model as an argument"
            )
        model = build_model(**values["architecture"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said when it was made
        net = Supernet(
            model,
            torch.zeros(values["input"]),
            values["bits"],
            {name: (bits[0], bits[1]) for name, bits in values["fixed"].items()},
            values["act_sign"],
            name=values["name"],
            **values["options"],
        )
    path = Path(folder) / TENSORS
    load_exactly(net, read_tensors(path), path)
    return net.to(device).eval()
