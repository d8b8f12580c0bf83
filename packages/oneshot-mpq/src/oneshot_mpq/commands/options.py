"""What several commands share: types of options, and how their texts are read."""

import sys
from typing import Literal

import tyro
from papercore.errors import InputError

Device = Literal["auto", "cpu", "cuda"]
DataName = Literal["digits", "cifar10", "cifar100", "folder"]
Positional = tyro.conf.Positional


def say(text: str) -> None:
    """A line for the user on standard error."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def parse_bits(text: str) -> tuple[int, ...]:
    """Raises InputError unless `text` is whole numbers separated by commas."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InputError("--bits", found=text, expected="whole numbers separated by commas") from None


def parse_fixed(text: str) -> dict[str, tuple[int, int | None]]:
    """`name=8/8;other=8/none;*.attn=32/none` as a supernet takes it.

    Raises:
        InputError: anything else.
    """
    fixed: dict[str, tuple[int, int | None]] = {}
    for part in filter(None, text.split(";")):
        name, _, bits = part.partition("=")
        weight, _, activation = bits.partition("/")
        try:
            fixed[name] = (int(weight), None if activation == "none" else int(activation))
        except ValueError:
            raise InputError("--fixed", found=part, expected="NAME=WEIGHT/ACTIVATION, bits or none") from None
    return fixed
