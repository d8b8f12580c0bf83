"""Which bits every layer gets, as JSON (specification of the method, section 5)."""

import dataclasses
import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from papercore.errors import InputError, located
from papercore.rundir import write_json

if TYPE_CHECKING:
    from oneshot_mpq.supernet import Supernet

FORMAT, VERSION = "oneshot-mpq/bitconfig", 1


@dataclasses.dataclass(frozen=True)
class LayerBits:
    """A searchable layer."""

    name: str
    weight_bits: int
    act_bits: int
    act_signed: bool = False


@dataclasses.dataclass(frozen=True)
class FixedBits:
    """A layer that is not searched; no act_bits: its input is not quantised."""

    name: str
    weight_bits: int
    act_bits: int | None


@dataclasses.dataclass(frozen=True)
class BitConfig:
    """The bits of a whole network. Layers are in the order of `named_modules`."""

    model: str
    input: tuple[int, ...]
    layers: tuple[LayerBits, ...]
    fixed: tuple[FixedBits, ...]
    bitops_G: float | None = None
    """1e9 bit operations of one sample, the fixed layers included"""
    size_MiB: float | None = None
    metrics: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """keys of the file that this version does not know; written back"""

    @property
    def weight_bits(self) -> tuple[int, ...]:
        return tuple(layer.weight_bits for layer in self.layers)

    @property
    def act_bits(self) -> tuple[int, ...]:
        return tuple(layer.act_bits for layer in self.layers)

    @classmethod
    def uniform(cls, net: "Supernet", weight_bits: int, act_bits: int) -> "BitConfig":
        """The same bits everywhere. A layer without so few (depthwise ones have no 2) takes its next higher candidate,
        with a warning that names it.

        Raises:
            InputError: bits that no candidate reaches.
        """
        weights, activations, lifted = [], [], []
        for name, layer in net.layers.items():
            w, a = (
                _at_least(bits, choices, name)
                for bits, choices in ((weight_bits, layer.weight_choices), (act_bits, layer.act_choices))
            )
            if (w, a) != (weight_bits, act_bits):
                lifted.append(f"{name} W{w}A{a}")
            weights.append(w)
            activations.append(a)
        if lifted:
            warnings.warn(f"W{weight_bits}A{act_bits} is not possible everywhere: {', '.join(lifted)}", stacklevel=2)
        return cls.of(net, weights, activations)

    @classmethod
    def of(cls, net: "Supernet", weight_bits: Sequence[int], act_bits: Sequence[int], **more: Any) -> "BitConfig":
        """From one number a layer; costs are counted.

        Raises:
            InputError: another number of layers, or bits that a layer does not have.
        """
        if not len(weight_bits) == len(act_bits) == len(net.layers):
            raise InputError(
                "bits", found=f"{len(weight_bits)} and {len(act_bits)} numbers", expected=f"{len(net.layers)} layers"
            )
        layers = tuple(
            LayerBits(name, int(w), int(a), layer.act_quantizer is not None and layer.act_quantizer.signed)
            for (name, layer), w, a in zip(net.layers.items(), weight_bits, act_bits, strict=True)
        )
        fixed = tuple(FixedBits(name, layer.weight_bits, layer.act_bits) for name, layer in net.fixed.items())
        config = cls(net.name, tuple(net.input_shape), layers, fixed, **more)
        config.check(net)
        cost = net.cost(config)
        return dataclasses.replace(config, bitops_G=cost.bitops_G, size_MiB=cost.size_MiB)

    def check(self, net: "Supernet") -> None:
        """Raises InputError with the first differences unless the configuration fits the network."""
        wrong: list[str] = []
        if self.model != net.name:
            wrong.append(f"model {self.model}, not {net.name}")
        here, there = [layer.name for layer in self.layers], list(net.layers)
        wrong += [f"layer {name} missing" for name in there if name not in here]
        wrong += [f"layer {name} unknown" for name in here if name not in there]
        if not wrong and here != there:
            first = next(i for i, (a, b) in enumerate(zip(here, there, strict=False)) if a != b)
            wrong.append(f"layer {first} is {here[first]}, not {there[first]}")
        for layer in self.layers:
            other = net.layers.get(layer.name)
            if other is None:
                continue
            for kind, bits, choices in (
                ("weight", layer.weight_bits, other.weight_choices),
                ("activation", layer.act_bits, other.act_choices),
            ):
                if bits not in choices:
                    wrong.append(f"{layer.name}: {kind} bits {bits}, not of {choices}")
        mine, theirs = {f.name: f for f in self.fixed}, net.fixed
        wrong += [f"fixed layer {name} missing" for name in theirs if name not in mine]
        wrong += [f"fixed layer {name} unknown" for name in mine if name not in theirs]
        for name in mine.keys() & theirs.keys():
            if (mine[name].weight_bits, mine[name].act_bits) != (theirs[name].weight_bits, theirs[name].act_bits):
                wrong.append(f"fixed layer {name} has other bits")
        if wrong:
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise InputError(f"the bit configuration does not fit {net.name}: {'; '.join(wrong[:3])}{more}")

    def diff(self, other: "BitConfig") -> list[tuple[str, str, str]]:
        """(layer, bits here, bits there) wherever the two differ; a layer that one of them lacks has "-"."""
        mine, theirs = (
            {layer.name: f"W{layer.weight_bits}A{layer.act_bits}" for layer in config.layers}
            for config in (self, other)
        )
        names = [*mine, *(name for name in theirs if name not in mine)]
        pairs = [(name, mine.get(name, "-"), theirs.get(name, "-")) for name in names]
        return [pair for pair in pairs if pair[1] != pair[2]]

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "version": VERSION,
            "model": self.model,
            "input": list(self.input),
            "layers": [dataclasses.asdict(layer) for layer in self.layers],
            "fixed": [dataclasses.asdict(layer) for layer in self.fixed],
            "bitops_G": self.bitops_G,
            "size_MiB": self.size_MiB,
            "metrics": dict(self.metrics),
            **self.extra,
        }

    def save(self, path: Path | str) -> None:
        """Writes the file at once or not at all."""
        write_json(Path(path), self.to_json())

    @classmethod
    def load(cls, path: Path | str) -> "BitConfig":
        """Raises InputError for what is not such a file."""
        path = Path(path)
        try:
            values = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise InputError("bit configuration", where=path, found=str(error), expected="JSON") from error
        with located(path):
            return cls.from_json(values)

    @classmethod
    def from_json(cls, values: Any) -> "BitConfig":
        """Raises InputError for another format or version, and names the first wrong entry."""
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            found = values.get("format") if isinstance(values, dict) else type(values).__name__
            raise InputError("format", found=found or "none", expected=FORMAT)
        if values.get("version") != VERSION:
            raise InputError("version", found=values.get("version", "none"), expected=VERSION)
        known = ("format", "version", "model", "input", "layers", "fixed", "bitops_G", "size_MiB", "metrics")
        missing = [key for key in ("model", "input", "layers", "fixed") if key not in values]
        if missing:
            raise InputError(f"key {missing[0]}", found="nothing", expected="a value")
        shape = values["input"]
        if not isinstance(shape, list) or not all(isinstance(n, int) and n > 0 for n in shape):
            raise InputError("input", found=shape, expected="the shape as a list of whole numbers")
        return cls(
            str(values["model"]),
            tuple(shape),
            tuple(_entry(LayerBits, item, f"layers[{i}]") for i, item in enumerate(_list(values, "layers"))),
            tuple(_entry(FixedBits, item, f"fixed[{i}]") for i, item in enumerate(_list(values, "fixed"))),
            values.get("bitops_G"),
            values.get("size_MiB"),
            values.get("metrics") or {},
            {key: value for key, value in values.items() if key not in known},
        )


def _at_least(bits: int, choices: Iterable[int], name: str) -> int:
    higher = [b for b in choices if b >= bits]
    if isinstance(bits, bool) or bits < 2 or not higher:
        raise InputError(f"uniform bits at {name}", found=bits, expected=f"of {tuple(choices)}")
    return min(higher)


def _list(values: dict[str, Any], key: str) -> list[Any]:
    if not isinstance(values[key], list):
        raise InputError(key, found=type(values[key]).__name__, expected="a list")
    return values[key]


def _entry(kind: type[Any], item: Any, where: str) -> Any:
    """A layer's entry, its types checked."""
    fields = {field.name: field for field in dataclasses.fields(kind)}
    if not isinstance(item, dict):
        raise InputError(where, found=type(item).__name__, expected="an object")
    for name, field in fields.items():
        if name not in item and field.default is dataclasses.MISSING:
            raise InputError(f"{where}.{name}", found="nothing", expected="a value")
        value = item.get(name)
        absent = value is None and kind is FixedBits and name == "act_bits"
        whole = isinstance(value, int) and not isinstance(value, bool)
        if name.endswith("_bits") and not absent and not whole:
            raise InputError(f"{where}.{name}", found=value, expected="a whole number")
    return kind(**{name: item[name] for name in fields if name in item})
