"""A distiller on disk, for any training loop.

student.safetensors     the plain student, under its own keys
aux.safetensors         the method: integrators, regressors, and its buffers (the state of CKA)
optimizer.safetensors   the optimiser's tensors, if one is given
state.json              epoch, state of the masks' generator, the optimiser's numbers
"""

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from papercore.errors import InputError
from papercore.rundir import atomic, read_json, write_json
from papercore.weights import read_tensors
from safetensors.torch import save_file
from torch import Tensor, nn

from dpk.distiller import Distiller
from dpk.taps import unwrap

STUDENT, AUX, OPTIMIZER, STATE = "student.safetensors", "aux.safetensors", "optimizer.safetensors", "state.json"


def save(folder: Path, distiller: Distiller, *, epoch: int, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Writes the four files, `state.json` last. `epoch`: how many are done."""
    folder = Path(folder)
    write_tensors(folder / STUDENT, distiller.student_state_dict())
    write_tensors(folder / AUX, distiller.method.state_dict())
    state: dict[str, Any] = {"epoch": epoch, "method": type(distiller.method).__name__, "generator": None}
    generator = distiller._generator
    if generator is not None:
        bits = base64.b64encode(generator.get_state().numpy().tobytes()).decode()
        state["generator"] = {"device": generator.device.type, "state": bits}
    if optimizer is not None:
        described = optimizer.state_dict()
        tensors, numbers = {}, {}
        for index, entries in described["state"].items():
            for name, value in entries.items():
                (tensors if isinstance(value, Tensor) else numbers)[f"{index}.{name}"] = value
        write_tensors(folder / OPTIMIZER, tensors)
        state["optimizer"] = {"file": OPTIMIZER, "numbers": numbers, "groups": described["param_groups"]}
    write_json(folder / STATE, state)


def load(folder: Path, distiller: Distiller, *, optimizer: torch.optim.Optimizer | None = None) -> int:
    """Brings back what `save` wrote and gives the number of epochs done. Everything is checked before anything moves.

    Raises:
        InputError: a file is missing or damaged, or of another student or method; names file, key and shapes.
    """
    folder = Path(folder)
    state = read_json(folder / STATE)
    if not isinstance(state, dict) or not isinstance(state.get("epoch"), int):
        raise InputError("field epoch", where=folder / STATE, found=state, expected="a whole number")
    student, method = unwrap(distiller.student), distiller.method
    tensors = {path: read_tensors(folder / path) for path in (STUDENT, AUX)}
    check_fit(student, tensors[STUDENT], folder / STUDENT)
    check_fit(method, tensors[AUX], folder / AUX)
    moments = None
    if optimizer is not None:
        if "optimizer" not in state:
            raise InputError("no optimiser", where=folder / STATE, expected="one, written by save(..., optimizer=...)")
        moments = read_moments(folder, state["optimizer"])
    generator = distiller._generator
    if state.get("generator") is not None:
        generator = restored(state["generator"], folder / STATE)
    student.load_state_dict(tensors[STUDENT])
    method.load_state_dict(tensors[AUX])
    if optimizer is not None and moments is not None:
        optimizer.load_state_dict(moments)
    distiller._generator = generator
    return state["epoch"]


def check_fit(module: nn.Module, tensors: Mapping[str, Tensor], where: Path) -> None:
    """Raises InputError, naming file, key and shapes, unless names and shapes are the module's."""
    wanted = module.state_dict()
    for name in sorted(wanted.keys() | tensors.keys()):
        found, expected = (f"shape {tuple(of[name].shape)}" if name in of else "nothing" for of in (tensors, wanted))
        if found != expected:
            raise InputError(f"tensor {name}", where=where, found=found, expected=expected)


def restored(described: Any, where: Path) -> torch.Generator:
    """The generator of `state.json`."""
    try:
        bits = base64.b64decode(described["state"], validate=True)
        generator = torch.Generator(described["device"])
        generator.set_state(torch.frombuffer(bytearray(bits), dtype=torch.uint8))
        return generator
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError("field generator", where=where, found=str(error), expected="a generator's state") from error


def read_moments(folder: Path, described: Any) -> dict[str, Any]:
    """The optimiser's state as torch takes it."""
    entries: dict[int, dict[str, Any]] = {}
    try:
        flat = read_tensors(folder / described["file"]) | described["numbers"]
        for key, value in flat.items():
            index, _, name = key.partition(".")
            entries.setdefault(int(index), {})[name] = value
        return {"state": entries, "param_groups": described["groups"]}
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError("field optimizer", where=folder / STATE, found=str(error), expected="its state") from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    # clones: weights that modules share may not share memory in the file
    copies = {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}
    with atomic(path) as temporary:
        save_file(copies, temporary)
