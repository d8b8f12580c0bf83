"""What several commands share: types of options, and how their texts are read."""

import sys
from typing import Literal

import tyro
from papercore.errors import InputError

Device = Literal["auto", "cpu", "cuda"]
Positional = tyro.conf.Positional


def say(text: str) -> None:
    """A line for the user on standard error."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def pick_device(device: Device) -> str:
    """ "auto" resolved.

    Raises:
        InputError: "cuda" without a GPU.
    """
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device", found="cuda", expected="a CUDA GPU in this machine")
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def parse_limit(text: str) -> int | dict[str, float]:
    """Raises InputError unless `text` is uniform=SIZE or bits=NUMBER and rescales=NUMBER."""
    names = {"bits": "bits_per_weight", "rescales": "rescales_per_token"}
    limits: dict[str, float] = {}
    try:
        for part in text.split(","):
            name, _, value = part.partition("=")
            if name == "uniform" and part == text:
                return int(value)
            limits[names[name]] = float(value)
    except (KeyError, ValueError):
        raise InputError(
            "--limit", found=text, expected="uniform=SIZE, or bits=NUMBER,rescales=NUMBER or one of them"
        ) from None
    return limits


def parse_labels(text: str) -> list[int]:
    """Raises InputError unless `text` is whole numbers separated by commas."""
    try:
        labels = [int(part) for part in text.split(",")]
        if max(map(abs, labels)) < 2**31:
            return labels
        raise ValueError
    except ValueError:
        raise InputError("--labels", found=text, expected="whole numbers separated by commas") from None
