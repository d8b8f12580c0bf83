"""A plan: which timesteps are visited and how many bits every tensor gets. One JSON file.

With the network, its noise schedule and the solver file, a plan is all that is needed to build the quantised network
and the sampler again.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from papercore.errors import InputError
from papercore.rundir import read_json, write_json
from torch import Tensor

from tmpqdm.schedulers import check_list

FORMAT, VERSION = "tmpqdm-plan", 1
Sampler = Literal["ddim", "dpmpp-2m"]


@dataclasses.dataclass(frozen=True)
class Plan:
    """See the module. Timesteps ascend; op names are the module names of the user's model.

    Raises:
        InputError: a list or bits that no plan can have.
    """

    timesteps: tuple[int, ...]
    """ascending"""
    bits: Mapping[str, Mapping[str, int]]
    """operation -> gene -> bits; where every step has its own, the largest of each"""
    model: Mapping[str, Any]
    """class, hash (of the float weights), parameters"""
    schedule: Mapping[str, Any]
    """T, betas_hash, prediction_type"""
    sampler: Sampler = "ddim"
    final_alpha: float = 1.0
    """cumulative alpha that the last step goes to"""
    per_step_bits: tuple[Mapping[str, Any], ...] | None = None
    """{"timestep": t, "bits": {...}} for every timestep, ascending"""
    cost: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    scores: tuple[Mapping[str, Any], ...] = ()
    """metric, n, seed, value, and what they are measured against"""
    solver: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """how the precision solver was made and calibrated"""
    seed: int = 0
    package_version: str = ""

    def __post_init__(self) -> None:
        if self.sampler not in get_args(Sampler):
            raise InputError("sampler", found=self.sampler, expected=" or ".join(get_args(Sampler)))
        if not self.timesteps:
            raise InputError("timesteps", found="an empty list", expected="at least one")
        total = self.schedule.get("T")
        if not isinstance(total, int) or total < 1:
            raise InputError("schedule.T", found=total, expected="the number of training steps")
        check_list(self.timesteps, total)
        object.__setattr__(self, "timesteps", tuple(int(t) for t in self.timesteps))
        if not 0 < self.final_alpha <= 1:
            raise InputError("final_alpha", found=self.final_alpha, expected="in (0, 1]")
        check_bits(self.bits, "bits")
        if self.per_step_bits is not None:
            steps = tuple(self.per_step_bits)
            listed = [step.get("timestep") for step in steps]
            if listed != list(self.timesteps):
                raise InputError("per_step_bits", found=listed, expected=f"the timesteps {list(self.timesteps)}")
            for step in steps:
                check_bits(step.get("bits"), f"per_step_bits of timestep {step['timestep']}")
            object.__setattr__(self, "per_step_bits", steps)

    def bits_at(self, timestep: int) -> Mapping[str, Mapping[str, int]]:
        """The bits of one visited timestep."""
        if self.per_step_bits is None:
            return self.bits
        return next(step["bits"] for step in self.per_step_bits if step["timestep"] == timestep)

    def check_schedule(self, alphas_cumprod: Tensor, *, force: bool = False) -> None:
        """Raises InputError when a noise schedule is not the plan's, unless forced."""
        found = betas_hash(alphas_cumprod)
        if not force and found != self.schedule.get("betas_hash"):
            raise InputError(
                "noise schedule",
                found=f"{len(alphas_cumprod)} steps, hash {found}",
                expected=f"{self.schedule['T']} steps, hash {self.schedule.get('betas_hash')}, the plan's",
                hint="force=True uses it nevertheless",
            )

    def check_model(self, hash_of_weights: str, *, force: bool = False) -> None:
        """Raises InputError when a model is not the plan's, unless forced."""
        if not force and hash_of_weights != self.model.get("hash"):
            raise InputError(
                "model",
                found=f"weights with hash {hash_of_weights[:12]}",
                expected=f"{self.model.get('hash', '')[:12]}",
            )

    def save(self, path: Path | str) -> None:
        """Writes the JSON file."""
        values = dataclasses.asdict(self)
        write_json(Path(path), {"format": FORMAT, "version": VERSION, **json.loads(json.dumps(values))})

    @classmethod
    def load(cls, path: Path | str) -> "Plan":
        """Reads and checks a file; nothing in it is evaluated.

        Raises:
            InputError: another format or version, or a field that is missing or wrong; names the file.
        """
        values = read_json(Path(path))
        if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
            raise InputError("format", where=path, expected=FORMAT)
        version = values.pop("version", None)
        if version != VERSION:
            raise InputError("version", where=path, found=version, expected=VERSION)
        known = {field.name: field for field in dataclasses.fields(cls)}
        for name in values:
            if name not in known:
                raise InputError(f"field {name}", where=path, expected=", ".join(known))
        for name, field in known.items():
            required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
            if required and name not in values:
                raise InputError(f"field {name}", where=path, found="nothing", expected="a value")
        try:
            for name in ("timesteps", "per_step_bits", "scores"):
                if values.get(name) is not None:
                    values[name] = tuple(values[name])
            return cls(**values)
        except InputError as error:
            raise InputError(str(error), where=path) from error
        except (TypeError, AttributeError, KeyError) as error:
            raise InputError("plan", where=path, found=str(error), expected="the fields of a plan") from error


def betas_hash(alphas_cumprod: Tensor) -> str:
    """Of a noise schedule, from its cumulative alphas to six digits (float32 and float64 give the same)."""
    digits = "/".join(f"{value:.6g}" for value in torch.as_tensor(alphas_cumprod).double().tolist())
    return hashlib.sha256(digits.encode()).hexdigest()[:16]


def check_bits(bits: Any, where: str) -> None:
    """Raises InputError unless it maps operations to genes to whole numbers from 2 to 32."""
    if not isinstance(bits, Mapping):
        raise InputError(where, found=type(bits).__name__, expected="operation -> gene -> bits")
    for name, genes in bits.items():
        if not isinstance(genes, Mapping):
            raise InputError(f"{where}: {name}", found=genes, expected="gene -> bits")
        for gene, value in genes.items():
            if gene not in ("w", "a", "q", "k", "v", "p"):
                raise InputError(f"{where}: {name}", found=f"gene {gene}", expected="w, a, q, k, v or p")
            if isinstance(value, bool) or not isinstance(value, int) or not 2 <= value <= 32:
                raise InputError(f"{where}: {name}.{gene}", found=value, expected="from 2 to 32")


def largest_bits(steps: Sequence[Mapping[str, Mapping[str, int]]]) -> dict[str, dict[str, int]]:
    """The largest bits of every gene over several steps: what stored weights need."""
    return {name: {gene: max(step[name][gene] for step in steps) for gene in steps[0][name]} for name in steps[0]}
