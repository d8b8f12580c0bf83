"""`dpk select-teacher`."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from papercore import cli
from papercore.errors import InputError
from papercore.rundir import check_output_folder

from dpk.commands.options import Dataset, Device, make_network, parse_settings, read_parts


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectTeacher(cli.Command):
    """Compare teachers for a student in short runs and predict the best.

    Finished runs in --out are only loaded, so that teachers can be added.
    """

    teachers: tuple[str, ...]
    """candidates as NETWORK=WEIGHTS, for example resnet56=resnet56.safetensors"""
    student: str
    """network, as for train"""
    out: Path
    """folder for the report and the short runs"""
    set: tuple[str, ...] = ()
    """arguments of DPK as NAME=VALUE"""
    dataset: Dataset = "digits"
    """what --data holds; digits are embedded"""
    data: Path | None = None
    """folder of the data set"""
    size: int | None = None
    """side of the pictures of a folder, in pixels"""
    epochs: int = 12
    """passes over the training set in a short run; a twentieth of a whole one is enough"""
    batch_size: int = 64
    """pictures a step"""
    learning_rate: float = 0.05
    """the highest; it falls as a cosine"""
    seed: int = 0
    """of everything random"""
    device: Device = "auto"
    """where to compute"""

    def run(self) -> Mapping[str, Any]:
        check_output_folder(self.out)
        if len(self.teachers) < 2:
            raise InputError("--teachers", found=self.teachers, expected="at least two NETWORK=WEIGHTS")
        given = []
        for text in self.teachers:
            name, separator, path = text.partition("=")
            if not separator or not name or not path:
                raise InputError("--teachers", found=text, expected="NETWORK=WEIGHTS")
            given.append((name, Path(path)))
        from papercore.report import Section, write_html
        from papercore.rundir import write_json

        from dpk.data import normalisation
        from dpk.recipe import Solver, make_method
        from dpk.teacher_selection import rho_picture, select_teacher, selection_table

        options = parse_settings(self.set)
        solver = Solver(
            epochs=self.epochs, batch_size=self.batch_size, learning_rate=self.learning_rate, schedule="cosine"
        )
        pictures, test = read_parts(self.dataset, self.data, self.size)
        channels = pictures.images.shape[3]
        prepare = normalisation(self.dataset, channels)
        names = [name if [n for n, _ in given].count(name) == 1 else f"{name} {path.stem}" for name, path in given]
        if len(set(names)) != len(names):
            raise InputError("--teachers", found=self.teachers, expected="each once")
        found = select_teacher(
            lambda: make_network(self.student, pictures.classes, channels, self.seed),
            {
                shown: make_network(name, pictures.classes, channels, self.seed, path)
                for shown, (name, path) in zip(names, given, strict=True)
            },
            lambda: make_method("dpk", options),
            pictures,
            test,
            solver.config(len(pictures), self.seed),
            self.out,
            example=prepare(pictures.images[:2], None),
            prepare=prepare,
            device=self.device,
        )
        table = selection_table(found)
        sections = (Section("Short runs", tables=(table,), pictures=(rho_picture(found),)),)
        write_html(self.out / "report.html", f"Teachers for {self.student}", sections, {"epochs": self.epochs})
        write_json(self.out / "teachers.json", [dataclasses.asdict(candidate) for candidate in found])
        return {"teachers": table, "report": self.out / "report.html"}
