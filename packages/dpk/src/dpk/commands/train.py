"""`dpk train`."""

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from papercore import cli
from papercore.errors import InputError
from papercore.rundir import check_output_folder

from dpk.commands.options import Dataset, Device, make_network, parse_pairs, parse_settings, read_parts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train(cli.Command):
    """Train a student with a teacher, or without one.

    Interrupted, it goes on where it stopped when it is called again. In several processes:
    torchrun --standalone --nproc-per-node 2 -m dpk.cli train ...
    """

    out: Path
    """folder for the student, the method's parts, log and checkpoint"""
    recipe: str = ""
    """file, or name of a recipe that comes with the package; options given besides it win"""
    student: str = ""
    """network: resnet20, wrn_16_2, vgg8, timm:NAME, digits_student, ..."""
    teacher: str = ""
    """network; method ce needs none"""
    teacher_weights: Path | None = None
    """safetensors of the teacher"""
    method: Literal["", "ce", "kd", "dkd", "fitnet", "at", "reviewkd", "dpk"] = ""
    """how the teacher teaches; dpk if nothing says otherwise"""
    pairs: tuple[str, ...] = ()
    """feature taps as STUDENT=TEACHER or STUDENT=TEACHER@PATCH; none: stages of equal stride"""
    set: tuple[str, ...] = ()
    """arguments of the method as NAME=VALUE, for example ratio=0.25 stages=all"""
    dataset: Dataset | Literal[""] = ""
    """what --data holds; digits are embedded"""
    data: Path | None = None
    """folder of the data set"""
    size: int | None = None
    """side of the pictures of a folder, in pixels"""
    epochs: int | None = None
    """passes over the training set"""
    batch_size: int | None = None
    """pictures a step, over all processes"""
    learning_rate: float | None = None
    """of the first epoch"""
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """data type of the forward pass"""
    seed: int = 0
    """of the student's first weights, the order of pictures, their augmentation and the masks; 0: the recipe's"""
    device: Device = "auto"
    """where to compute"""
    resume: bool = True
    """go on with the run in --out; --no-resume starts anew"""

    def run(self) -> Mapping[str, Any]:
        check_output_folder(self.out)
        from dpk.data import normalisation
        from dpk.distiller import Distiller
        from dpk.recipe import Recipe
        from dpk.training import train

        recipe = self.combined()
        assert isinstance(recipe, Recipe)
        method = recipe.build_method()
        if method.needs_teacher and (not recipe.teacher or recipe.teacher_weights is None):
            raise InputError(f"method {recipe.method}", found="no trained teacher", expected="--teacher-weights")
        pictures, test = read_parts(recipe.dataset, self.data, self.size)
        height, width, channels = pictures.images.shape[1:]
        networks = [make_network(recipe.student, pictures.classes, channels, recipe.seed)]
        if method.needs_teacher and recipe.teacher:
            networks.append(
                make_network(recipe.teacher, pictures.classes, channels, recipe.seed, recipe.teacher_weights)
            )
        prepare = normalisation(recipe.dataset, channels)
        example = prepare(pictures.images[:2], None)
        distiller = Distiller(
            networks[0], networks[1] if len(networks) > 1 else None, method, example, seed=recipe.seed
        )
        result = train(
            distiller,
            pictures,
            recipe.solver.config(len(pictures), recipe.seed),
            self.out,
            test=test,
            prepare=prepare,
            device=self.device,
            resume=self.resume,
            provenance={"recipe": dataclasses.asdict(recipe), "size": [height, width]},
        )
        if not result.is_main:
            sys.exit(cli.DONE)  # one of several processes speaks
        assert result.last is not None
        assert result.best is not None
        return {
            "student": self.out / "student.safetensors",
            "pairs": [f"{pair.student} = {pair.teacher}" for pair in distiller.pairs],
            "top-1 (last epoch)": result.last.top1,
            "top-5 (last epoch)": result.last.top5,
            "top-1 (best epoch, chosen on the test set)": result.best[0],
            "best epoch": result.best[1],
            "seconds": result.seconds,
        }

    def combined(self) -> Any:
        """The recipe with the options that were given.

        Raises:
            InputError: no student, or a recipe that is wrong.
        """
        from dpk.recipe import Recipe, read_recipe

        if not self.recipe and not self.student:
            raise InputError("--student", found="nothing", expected="a network, or --recipe")
        recipe = read_recipe(self.recipe) if self.recipe else Recipe(self.student, dataset="digits")
        changes: dict[str, Any] = {}
        for name in ("student", "teacher", "teacher_weights", "method", "dataset", "seed"):
            value = getattr(self, name)
            if value not in ("", None, 0):
                changes[name] = value
        if self.set:
            changes["options"] = ({} if self.method else recipe.options) | parse_settings(self.set)
        elif self.method and self.method != recipe.method:
            changes["options"] = {}
        if self.pairs:
            changes["pairs"] = parse_pairs(self.pairs)
        solver = {
            name: getattr(self, name)
            for name in ("epochs", "batch_size", "learning_rate", "mixed_precision")
            if getattr(self, name) is not None
        }
        return dataclasses.replace(recipe, solver=dataclasses.replace(recipe.solver, **solver), **changes)
