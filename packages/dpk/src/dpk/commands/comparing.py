"""`dpk compare`, `dpk cka`, `dpk convert-config`, `dpk benchmark`."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from papercore import cli
from papercore.errors import InputError
from papercore.rundir import check_output_folder

Source = Literal["digits", "cifar10", "cifar100", "npz", "folder"]
Device = Literal["auto", "cpu", "cuda"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compare(cli.Command):
    """Train several methods with the same seeds and print one table."""

    student: str = "digits_student"
    """network, see `dpk train --help`"""
    teacher: str = "digits_large"
    """network"""
    teacher_weights: Path | None = None
    """safetensors file of the trained teacher"""
    methods: str = "ce,kd,fitnet,dpk"
    """names separated by commas: ce, kd, dkd, fitnet, at, reviewkd, dpk; with the protocol's settings"""
    dataset: Source = "digits"
    """what is learned"""
    data: Path | None = None
    """folder of the data set"""
    out: Path = Path("dpk-compare")
    """a folder for every method and seed, and table.json"""
    seeds: int = 3
    """students a method"""
    epochs: int = 25
    """of every student"""
    batch_size: int = 64
    """images a step"""
    learning_rate: float = 0.05
    """at the start; falls as a cosine"""
    limit: int | None = None
    """take no more than so many images of each part"""
    seed: int = 0
    """the first of the seeds"""
    device: Device = "auto"
    """where to compute"""
    resume: bool = True
    """go on with what is in the folder"""

    def run(self) -> Mapping[str, Any]:
        from papercore.rundir import write_json

        from dpk.compare import compare, comparison_table
        from dpk.loading import load_data, load_network
        from dpk.protocol import PAIRS, method_options
        from dpk.recipe import METHODS, Solver, make_method

        names = [name.strip() for name in self.methods.split(",") if name.strip()]
        for name in names:
            if name not in METHODS:
                raise InputError("--methods", found=name, expected=", ".join(METHODS))
        if len(set(names)) != len(names) or not names:
            raise InputError("--methods", found=self.methods, expected="at least one, each once")
        if self.seeds < 1:
            raise InputError("--seeds", found=self.seeds, expected="at least 1")
        check_output_folder(self.out)
        train, test, prepare, example = load_data(self.dataset, self.data, limit=self.limit)
        teacher = load_network(self.teacher, train.classes, self.teacher_weights)
        pair = next((p for p in PAIRS if (p.teacher, p.student) == (self.teacher, self.student)), None)
        solver = Solver(
            epochs=self.epochs,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            schedule="cosine",
        )
        found = compare(
            lambda seed: load_network(self.student, train.classes, None, seed),
            teacher,
            {name: lambda name=name: make_method(name, method_options(name, pair)) for name in names},
            train,
            test,
            solver.config(len(train), self.seed),
            self.out,
            seeds=range(self.seed, self.seed + self.seeds),
            example=example,
            prepare=prepare,
            device=self.device,
            resume=self.resume,
        )
        write_json(self.out / "table.json", [dataclasses.asdict(row) for row in found])
        warning = {} if self.teacher_weights is not None else {"note": "the teacher is untrained: --teacher-weights"}
        return {"table": comparison_table(found), "out": self.out, **warning}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CKA(cli.Command):
    """Compare all layers of one network with all layers of another."""

    first: str
    """network, see `dpk train --help`"""
    second: str
    """network; may be the same"""
    first_weights: Path | None = None
    """safetensors file; none: fresh weights"""
    second_weights: Path | None = None
    """safetensors file; none: fresh weights"""
    dataset: Source = "digits"
    """whose test images are shown to both"""
    data: Path | None = None
    """folder of the data set"""
    images: int = 1024
    """how many"""
    batch_size: int = 256
    """images a minibatch, at least 4"""
    layers: Literal["stages", "all"] = "stages"
    """stages: stem, stages, their blocks, classifier; all: every module that gives a tensor of its own"""
    out: Path = Path("dpk-cka")
    """folder for cka.json and cka.png"""
    seed: int = 0
    """of fresh weights; the second network has the next one"""
    device: Device = "auto"
    """where to compute"""

    def run(self) -> Mapping[str, Any]:
        import torch

        from dpk.cka_report import cka_matrix, write_report
        from dpk.loading import batches_of, load_data, load_network

        if self.batch_size < 4:
            raise InputError("--batch-size", found=self.batch_size, expected="at least 4")
        check_output_folder(self.out)
        _, test, prepare, _ = load_data(self.dataset, self.data, limit=self.images)
        networks = [
            load_network(name, test.classes, weights, seed)
            for name, weights, seed in (
                (self.first, self.first_weights, self.seed),
                (self.second, self.second_weights, self.seed + 1),
            )
        ]
        device = ("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device
        matrix = cka_matrix(
            networks[0],
            networks[1],
            batches_of(test, prepare, self.batch_size),
            first_layers=self.layers,
            second_layers=self.layers,
            device=device,
        )
        write_report(matrix, self.out, (self.first, self.second))
        best = matrix.values.argmax(1).tolist()
        return {
            "layers": f"{len(matrix.first)} x {len(matrix.second)}",
            "images": matrix.samples,
            "most alike": {
                name: f"{matrix.second[j]} ({float(matrix.values[i, j]):.3f})"
                for i, (name, j) in enumerate(zip(matrix.first, best, strict=True))
            },
            "numbers": self.out / "cka.json",
            "picture": self.out / "cka.png",
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertConfig(cli.Command):
    """Turn a configuration of mdistiller into a recipe for `dpk train --recipe`."""

    source: Path
    """YAML file with DISTILLER and SOLVER"""
    out: Path
    """recipe to write"""

    def run(self) -> Mapping[str, Any]:
        import yaml
        from papercore.rundir import write_text

        from dpk.convert_config import convert_config

        found = convert_config(self.source)
        write_text(self.out, yaml.safe_dump(found.recipe, sort_keys=False))
        return {"recipe": self.out, "left out": found.left_out or "nothing"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Benchmark(cli.Command):
    """Time a step of DPK, FitNet and ReviewKD on the same pair, interleaved."""

    teacher: str = "resnet56"
    """network"""
    student: str = "resnet20"
    """network"""
    batch_size: int = 64
    """images a step"""
    repetitions: int = 30
    """steps of each method that are timed"""
    seed: int = 0
    """of weights and images"""
    device: Device = "auto"
    """where to compute"""

    def run(self) -> Mapping[str, Any]:
        from dpk.benchmark import benchmark_steps

        return benchmark_steps(
            self.teacher, self.student, self.batch_size, self.repetitions, device=self.device, seed=self.seed
        )
