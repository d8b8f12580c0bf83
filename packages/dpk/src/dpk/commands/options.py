"""What several commands share: types of options, how their texts are read, networks and data from names."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro
from papercore.errors import InputError

if TYPE_CHECKING:
    from torch import nn

    from dpk.data import Pictures

Device = Literal["auto", "cpu", "cuda"]
Dataset = Literal["digits", "cifar10", "cifar100", "npz", "folder"]
Positional = tyro.conf.Positional


def say(text: str) -> None:
    """A line for the user on standard error."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def parse_settings(texts: Sequence[str]) -> dict[str, Any]:
    """NAME=VALUE texts, values as YAML reads them.

    Raises:
        InputError: no such text, or a name twice.
    """
    import yaml

    found: dict[str, Any] = {}
    for text in texts:
        name, separator, value = text.partition("=")
        if not separator or not name or name in found:
            raise InputError("--set", found=text, expected="NAME=VALUE, each name once")
        try:
            found[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise InputError("--set", found=text, expected="NAME=VALUE") from error
        if isinstance(found[name], str):
            try:
                found[name] = float(value)  # YAML 1.1 reads 1e-3 as a string
            except ValueError:
                continue
    return found


def parse_pairs(texts: Sequence[str]) -> list[dict[str, Any]]:
    """STUDENT=TEACHER or STUDENT=TEACHER@PATCH texts as fields of pairs; one name alone stands for both.

    Raises:
        InputError: another form.
    """
    pairs = []
    for text in texts:
        names, _, patch = text.partition("@")
        student, _, teacher = names.partition("=")
        if not student or (patch and not patch.isdigit()):
            raise InputError("--pairs", found=text, expected="STUDENT=TEACHER or STUDENT=TEACHER@PATCH")
        pairs.append({"student": student, "teacher": teacher or student, "patch": int(patch) if patch else None})
    return pairs


def make_network(name: str, classes: int, channels: int, seed: int, weights: Path | None = None) -> "nn.Module":
    """A network for pictures of these channels, see `loading.load_network`.

    Raises:
        InputError: no such network, not one for these pictures, or weights that do not fit.
    """
    from dpk.loading import load_network

    digits = name.startswith("digits_")
    if channels != (1 if digits else 3) or (digits and classes != 10):
        raise InputError(
            "network",
            found=name,
            expected=f"one for {channels} channels and {classes} classes",
            hint="digits_student, digits_small and digits_large take one channel, all others three",
        )
    return load_network(name, classes, weights, seed)


def pick_device(device: Device) -> str:
    """ "auto" resolved.

    Raises:
        InputError: "cuda" without a GPU.
    """
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device", found="cuda", expected="a CUDA GPU in this machine")
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def read_parts(
    dataset: Dataset, data: Path | None, size: int | None, limit: int | None = None
) -> "tuple[Pictures, Pictures]":
    """Training and test pictures, of the same classes; at most `limit` of each."""
    from dpk.data import Pictures, read

    if limit is not None and limit < 1:
        raise InputError("--limit", found=limit, expected="at least 1")
    train, test = (read(dataset, data, part, size=size) for part in ("train", "test"))
    if train.images.shape[1:] != test.images.shape[1:]:
        raise InputError(
            "size of the test pictures",
            where=data,
            found=tuple(test.images.shape[1:]),
            expected=tuple(train.images.shape[1:]),
        )
    if dataset == "folder" and train.names != test.names:
        raise InputError("classes of the test pictures", where=data, found=test.names, expected=train.names)
    if limit is not None:
        train, test = (Pictures(part.images[:limit], part.labels[:limit], part.names) for part in (train, test))
    return train, test
