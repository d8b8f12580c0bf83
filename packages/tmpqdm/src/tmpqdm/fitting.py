"""Calibration of all units of a network: rounding and step sizes, every bit-width in turn (TMPQ-DM's "respective" way).

Weights first: a unit's inputs come from the network whose earlier weights are quantised ("same": at the same bits;
"mixed": at bits drawn at random, nearer to what a search evaluates). Then step sizes: inputs in full precision, weights
rounded. Targets are the unit's full-precision outputs. Everything random follows from the seed, the phase, the bits and
the unit, so that a run that was cut off goes on to the same result.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from papercore.rundir import atomic
from papercore.weights import read_tensors
from safetensors.torch import save_file
from torch import Tensor, nn

from tmpqdm.layers import WeightHalf
from tmpqdm.models import Conditions
from tmpqdm.quantisers import LearnedStep, SplitStep
from tmpqdm.reconstruction import batches_of, learn_rounding, learn_steps
from tmpqdm.rounding import SoftRounding, pack_flags
from tmpqdm.units import Call, Forward, Unit, in_batches, walk

Assignment = Mapping[str, Mapping[str, int]]
"""bits of every gene of every operation"""


@dataclasses.dataclass(frozen=True)
class Settings:
    weight_iters: int
    act_iters: int
    batch_size: int
    prefix: Literal["same", "mixed"]
    seed: int
    progress: Callable[[str], None]
    store: Path | None
    """folder for the results of finished units"""
    rounding_rate: float
    step_rate: float
    learn_softmax: bool
    """whether the softmax matrix's step is learned: not where it is one for all bits, or it would depend on the menu"""


class Fitter:
    """Works on `network` in place: quantisers must have their starting values at all bits of the assignments."""

    def __init__(
        self,
        network: nn.Module,
        units: Sequence[Unit],
        inputs: tuple[Tensor, Tensor, Conditions],
        settings: Settings,
    ) -> None:
        self.network, self.units, self.inputs, self.settings = network, units, inputs, settings
        self.learned: set[tuple[str, str, int]] = set()
        """(operation, gene, bits) that are done; a pinned gene turns up in every assignment"""

    def weights(self, assignments: Mapping[str, Assignment]) -> None:
        """Learns the rounding of every assignment; names are for progress and for the store."""
        if self.settings.prefix == "same":
            for name, bits in assignments.items():
                self._weights_pass({name: bits})
        else:
            self._weights_pass(assignments)

    def _weights_pass(self, assignments: Mapping[str, Assignment]) -> None:
        everything = list(assignments.values())

        def visit(number: int, unit: Unit, forward: Forward, calls: Sequence[Call]) -> Sequence[Tensor]:
            full, quantised = calls
            size = self.settings.batch_size
            unit.use(None)
            targets = in_batches(forward, full, size)
            for name, bits in assignments.items():
                unit.use(None)
                self._unit_weights(number, unit, forward, quantised, targets, name, bits)
            if len(everything) == 1:
                unit.use(everything[0], "w")
                return targets, in_batches(forward, quantised, size)
            generator = self._generator("mixed", "all", number)
            outputs = []
            for begin in range(0, quantised.batch, size):
                for layer_name, layer in unit.layers.items():
                    choice = int(torch.randint(len(everything), (), generator=generator))
                    layer.use(w=everything[choice][layer_name]["w"])
                args, kwargs = quantised.rows(slice(begin, begin + size))
                outputs.append(forward(*args, **kwargs))
            return targets, torch.cat(outputs)

        walk(
            self.network, self.units, *self.inputs, streams=2, visit=visit,
            bits=[lambda name: {}, lambda name: {"w": everything[0][name]["w"]}],
        )  # fmt: skip

    def _unit_weights(
        self, number: int, unit: Unit, forward: Forward, call: Call, targets: Tensor, name: str, bits: Assignment
    ) -> None:
        layers = {key: layer for key, layer in unit.layers.items() if (key, "w", bits[key]["w"]) not in self.learned}
        self.learned |= {(key, "w", bits[key]["w"]) for key in layers}
        if not layers or not self.settings.weight_iters:
            return
        stored = self._read("w", name, number)
        parts: list[SoftRounding] = []
        owners = []
        for key, layer in layers.items():
            width = bits[key]["w"]
            halves = layer.halves[width]
            if stored is not None:
                flags = [stored[f"{key}/{i}"] for i in range(len(halves))]
                layer.set_halves(
                    width, tuple(WeightHalf(h.delta, h.zero, up) for h, up in zip(halves, flags, strict=True))
                )
                continue
            owners.append((layer, len(halves)))
            for half, weight in zip(halves, layer.weights(), strict=True):
                parts.append(SoftRounding(weight, half.delta, half.zero, width))
        if stored is not None:
            return
        for key, layer in unit.layers.items():  # those learned before stay at their bits
            if key not in layers:
                layer.use(w=bits[key]["w"])

        def predict(soft: Sequence[Tensor], index: Tensor) -> Tensor:
            left = iter(soft)
            for layer, halves in owners:
                layer.w = torch.cat([next(left) for _ in range(halves)], 1) if halves > 1 else next(left)
            args, kwargs = call.rows(index)
            return forward(*args, **kwargs)

        settings = self.settings
        batches = batches_of(call.batch, settings.batch_size, settings.weight_iters, self._generator("w", name, number))
        learn_rounding(parts, predict, targets, batches, settings.weight_iters, rate=settings.rounding_rate)
        left = iter(parts)
        result = {}
        for (key, layer), (_, count) in zip(layers.items(), owners, strict=True):
            flags = [pack_flags(next(left).up()) for _ in range(count)]
            width = bits[key]["w"]
            halves = layer.halves[width]
            layer.set_halves(width, tuple(WeightHalf(h.delta, h.zero, up) for h, up in zip(halves, flags, strict=True)))
            result |= {f"{key}/{i}": up for i, up in enumerate(flags)}
        self._write("w", name, number, result)

    def steps(self, assignments: Mapping[str, Assignment]) -> None:
        """Learns the step sizes of every assignment in one full-precision pass."""

        def visit(number: int, unit: Unit, forward: Forward, calls: Sequence[Call]) -> Sequence[Tensor]:
            unit.use(None)
            targets = in_batches(forward, calls[0], self.settings.batch_size)
            for name, bits in assignments.items():
                self._unit_steps(number, unit, forward, calls[0], targets, name, bits)
            return (targets,)

        walk(self.network, self.units, *self.inputs, streams=1, visit=visit, bits=[lambda name: {}])

    def _unit_steps(
        self, number: int, unit: Unit, forward: Forward, call: Call, targets: Tensor, name: str, bits: Assignment
    ) -> None:
        if not self.settings.act_iters:
            return
        stored = self._read("a", name, number)
        result: dict[str, Tensor] = {}
        unit.use(bits)
        learned: dict[str, LearnedStep] = {}
        for key, layer in unit.layers.items():
            width = bits[key]["a"]
            if (key, "a", width) not in self.learned:
                self.learned.add((key, "a", width))
                halves = [LearnedStep(step) for step in layer.step_halves(width)]
                learned |= {f"{key}/a/{i}": half for i, half in enumerate(halves)}
                layer.act = halves[0] if layer.split is None else SplitStep((halves[0], halves[1]), layer.split)
        for key, attention in unit.attentions.items():
            for gene in attention.genes:
                width = bits[key][gene]
                if gene == "p" and not self.settings.learn_softmax:
                    continue
                if (key, gene, width) not in self.learned:
                    self.learned.add((key, gene, width))
                    learned[f"{key}/{gene}/0"] = attention.acts[gene] = LearnedStep(attention.steps[gene][width])
        if not learned:
            return
        if stored is None:

            def predict(index: Tensor) -> Tensor:
                args, kwargs = call.rows(index)
                return forward(*args, **kwargs)

            settings = self.settings
            batches = batches_of(
                call.batch, settings.batch_size, settings.act_iters, self._generator("a", name, number)
            )
            learn_steps(list(learned.values()), predict, targets, batches, settings.act_iters, rate=settings.step_rate)
            result = {key: step.delta.detach() for key, step in learned.items()}
            self._write("a", name, number, result)
        if stored is not None:
            for key, one in learned.items():
                one.delta = stored[key].to(one.delta.device)
        for key, layer in unit.layers.items():
            if f"{key}/a/0" in learned:
                halves = range(1 if layer.split is None else 2)
                layer.set_steps(tuple(learned[f"{key}/a/{i}"].result() for i in halves))
        for key, attention in unit.attentions.items():
            for gene in attention.genes:
                if f"{key}/{gene}/0" in learned:
                    step = learned[f"{key}/{gene}/0"].result()
                    attention.steps[gene][step.bits] = step

    def _generator(self, phase: str, name: str, number: int) -> torch.Generator:
        digest = hashlib.sha256(f"{self.settings.seed}/{phase}/{name}/{number}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))

    def _path(self, phase: str, name: str, number: int) -> Path:
        assert self.settings.store is not None
        return self.settings.store / f"{phase}-{name}-{number:04d}.safetensors"

    def _read(self, phase: str, name: str, number: int) -> dict[str, Tensor] | None:
        if self.settings.store is None or not self._path(phase, name, number).exists():
            return None
        return read_tensors(self._path(phase, name, number))

    def _write(self, phase: str, name: str, number: int, tensors: Mapping[str, Tensor]) -> None:
        what = "rounding" if phase == "w" else "step sizes"
        self.settings.progress(f"{what} of {self.units[number].name}, {name} ({number + 1}/{len(self.units)})")
        if self.settings.store is not None and tensors:
            with atomic(self._path(phase, name, number)) as temporary:
                save_file({key: value.cpu().contiguous() for key, value in tensors.items()}, temporary)


@torch.no_grad()
def unit_errors(
    network: nn.Module,
    units: Sequence[Unit],
    inputs: tuple[Tensor, Tensor, Conditions],
    bits: Assignment,
    batch_size: int,
) -> dict[str, float]:
    """|y' - y|^2 / |y|^2 of every unit's output, everything before it quantised as well."""
    errors: dict[str, float] = {}

    def visit(number: int, unit: Unit, forward: Forward, calls: Sequence[Call]) -> Sequence[Tensor]:
        unit.use(None)
        full = in_batches(forward, calls[0], batch_size)
        unit.use(bits)
        quantised = in_batches(forward, calls[1], batch_size)
        errors[unit.name] = float((quantised - full).square().sum() / full.square().sum())
        return full, quantised

    choose = [lambda name: {}, lambda name: dict(bits[name])]
    walk(network, units, *inputs, streams=2, visit=visit, bits=choose)
    return errors
