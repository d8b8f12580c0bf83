"""`dpk compare`, `dpk cka`, `dpk convert-config`, `dpk benchmark`."""

import dataclasses
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from papercore import cli
from papercore.errors import InputError
from papercore.rundir import check_output_file, check_output_folder

from dpk.commands.options import Dataset, Device, Positional, make_network, pick_device, read_parts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compare(cli.Command):
    """Train several methods with the same seeds and print one table.

    Methods have the settings of the CIFAR-100 protocol, the recipe's own method the recipe's. Finished students in
    --out are only loaded, so that methods and seeds can be added.
    """

    out: Path
    """folder for table.json and a folder for every method and seed"""
    methods: str = "ce,kd,fitnet,dpk"
    """names separated by commas: ce, kd, dkd, fitnet, at, reviewkd, dpk"""
    recipe: str = ""
    """file, or name of one that comes with the package: networks, data set, solver; none: 25 epochs on digits"""
    student: str = ""
    """network, as for train"""
    teacher: str = ""
    """network"""
    teacher_weights: Path | None = None
    """safetensors of the teacher; needed unless the only method is ce"""
    dataset: Dataset | Literal[""] = ""
    """what --data holds; digits are embedded"""
    data: Path | None = None
    """folder of the data set"""
    size: int | None = None
    """side of the pictures of a folder, in pixels"""
    limit: int | None = None
    """take no more than so many pictures of each part"""
    seeds: int = 3
    """students a method"""
    epochs: int | None = None
    """of every student"""
    batch_size: int | None = None
    """pictures a step, over all processes"""
    learning_rate: float | None = None
    """of the first epoch"""
    seed: int = 0
    """the first of the seeds: of weights, order of pictures, augmentation and masks"""
    device: Device = "auto"
    """where to compute"""
    resume: bool = True
    """go on with what is in --out; --no-resume starts anew"""

    def run(self) -> Mapping[str, Any]:
        names = [name.strip() for name in self.methods.split(",") if name.strip()]
        if len(set(names)) != len(names) or not names:
            raise InputError("--methods", found=self.methods, expected="at least one, each once")
        if self.seeds < 1:
            raise InputError("--seeds", found=self.seeds, expected="at least 1")
        check_output_folder(self.out)
        from papercore.rundir import write_json

        from dpk.compare import compare, comparison_table
        from dpk.data import normalisation
        from dpk.method import Method
        from dpk.protocol import PAIRS, method_options
        from dpk.recipe import make_method

        recipe = self.combined()
        pair = next((p for p in PAIRS if (p.teacher, p.student) == (recipe.teacher, recipe.student)), None)
        methods: dict[str, Callable[[], Method]] = {
            name: lambda name=name: make_method(name, method_options(name, pair)) for name in names
        }
        if self.recipe and recipe.method in names:
            methods[recipe.method] = recipe.build_method
        needs_teacher = [name for name, make in methods.items() if make().needs_teacher]
        if needs_teacher and (not recipe.teacher or recipe.teacher_weights is None):
            raise InputError(f"method {needs_teacher[0]}", found="no trained teacher", expected="--teacher-weights")
        train, test = read_parts(recipe.dataset, self.data, self.size, self.limit)
        channels = train.images.shape[3]
        teacher = (
            make_network(recipe.teacher, train.classes, channels, 0, recipe.teacher_weights) if needs_teacher else None
        )
        prepare = normalisation(recipe.dataset, channels)
        found = compare(
            lambda seed: make_network(recipe.student, train.classes, channels, seed),
            teacher,
            methods,
            train,
            test,
            recipe.solver.config(len(train), self.seed),
            self.out,
            seeds=range(self.seed, self.seed + self.seeds),
            example=prepare(train.images[:2], None),
            prepare=prepare,
            device=self.device,
            resume=self.resume,
        )
        if not found:
            sys.exit(cli.DONE)  # one of several processes speaks
        write_json(self.out / "table.json", [dataclasses.asdict(row) for row in found])
        title = f"{recipe.student}" + (f" taught by {recipe.teacher}" if needs_teacher else "")
        return {"table": comparison_table(found, f"{title}, {recipe.dataset}: top-1, percent"), "out": self.out}

    def combined(self) -> Any:
        """The recipe with the options that were given."""
        from dpk.recipe import Recipe, Solver, read_recipe

        if self.recipe:
            recipe = read_recipe(self.recipe)
        else:
            solver = Solver(epochs=25, schedule="cosine", milestones=())
            recipe = Recipe("digits_student", "digits_large", dataset="digits", solver=solver)
        names = ("student", "teacher", "teacher_weights", "dataset")
        changes = {name: getattr(self, name) for name in names if getattr(self, name) not in ("", None)}
        names = ("epochs", "batch_size", "learning_rate")
        solver = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return dataclasses.replace(recipe, solver=dataclasses.replace(recipe.solver, **solver), **changes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CKA(cli.Command):
    """Compare all layers of one network with all layers of another."""

    first: Positional[str]
    """network, as for train"""
    second: Positional[str]
    """network; may be the same"""
    first_weights: Path | None = None
    """safetensors file; none: fresh weights"""
    second_weights: Path | None = None
    """safetensors file; none: fresh weights"""
    dataset: Dataset = "digits"
    """whose test pictures are shown to both"""
    data: Path | None = None
    """folder of the data set"""
    size: int | None = None
    """side of the pictures of a folder, in pixels"""
    images: int = 1024
    """how many of them"""
    batch_size: int = 256
    """pictures a minibatch, at least 4"""
    layers: Literal["stages", "all"] = "stages"
    """stages: stem, stages, their blocks, classifier; all: every module that gives a tensor of its own"""
    out: Path = Path("dpk-cka")
    """folder for cka.json and cka.png"""
    seed: int = 0
    """of fresh weights; the second network has the next one"""
    device: Device = "auto"
    """where to compute"""

    def run(self) -> Mapping[str, Any]:
        if self.batch_size < 4 or self.images < 4:
            raise InputError("--batch-size, --images", found=(self.batch_size, self.images), expected="at least 4")
        check_output_folder(self.out)
        from dpk.cka_report import cka_matrix, write_report
        from dpk.data import normalisation, read

        pictures = read(self.dataset, self.data, "test", size=self.size)
        channels = pictures.images.shape[3]
        prepare = normalisation(self.dataset, channels)
        networks = [
            make_network(name, pictures.classes, channels, seed, weights)
            for name, weights, seed in (
                (self.first, self.first_weights, self.seed),
                (self.second, self.second_weights, self.seed + 1),
            )
        ]
        matrix = cka_matrix(
            networks[0],
            networks[1],
            (prepare(images, None) for images in pictures.images[: self.images].split(self.batch_size)),
            first_layers=self.layers,
            second_layers=self.layers,
            device=pick_device(self.device),
        )
        write_report(matrix, self.out, (self.first, self.second))
        best = matrix.values.argmax(1).tolist()
        return {
            "layers": f"{len(matrix.first)} x {len(matrix.second)}",
            "pictures": matrix.samples,
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

    source: Positional[Path]
    """YAML file with DISTILLER and SOLVER"""
    out: Path
    """recipe to write"""

    def run(self) -> Mapping[str, Any]:
        check_output_file(self.out)
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
