"""A paper's claims, re-tested. A package offers one `Paper` through the entry point group `papercore.papers`."""

import dataclasses
import importlib.metadata
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from papercore.errors import InputError, WorkError
from papercore.report import Picture, Section, Table, write_html, write_markdown
from papercore.rundir import environment, write_json

GROUP = "papercore.papers"
Scale = Literal["tiny", "small", "full"]


@dataclasses.dataclass(frozen=True)
class Claim:
    """One claim and what came of it."""

    name: str
    """short and stable, for example "C1" """
    statement: str
    paper: str
    """the paper's own figure, with its setting"""
    measured: str
    """the figure measured here"""
    criterion: str
    """what decides, fixed before the measurement"""
    holds: bool


@dataclasses.dataclass(frozen=True)
class Reproduction:
    """Everything a reproduction has to say."""

    claims: Sequence[Claim]
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()
    text: str = ""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a reproduction is told."""

    scale: Scale
    out: Path
    data: Path | None
    device: str
    seed: int
    say: Callable[[str], None]
    """tells the user what is going on, a line at a time"""


@dataclasses.dataclass(frozen=True)
class Paper:
    """A package's paper and how to re-test it."""

    package: str
    title: str
    reference: str
    scales: Sequence[Scale]
    """the scales that exist"""
    run: Callable[[Settings], Reproduction]


def installed(only: Sequence[str] = ()) -> list[Paper]:
    """The papers of the installed packages, by name.

    Raises:
        InputError: `only` names a package that offers none.
    """
    found = {point.name: point for point in importlib.metadata.entry_points(group=GROUP)}
    for name in only:
        if name not in found:
            raise InputError("--only", found=name, expected=f"one of {', '.join(sorted(found)) or 'none installed'}")
    papers = []
    for name in sorted(only or found):
        try:
            papers.append(found[name].load())
        except ImportError as error:
            raise InputError(
                f"package {name}", found=f"an import that fails ({error})", expected="all it needs"
            ) from error
    return papers


def reproduce(papers: Sequence[Paper], settings: Settings) -> Table:
    """Runs the papers one after another and gives the table of claims.

    Writes `report.html`, `report.md` and `claims.json` into `settings.out`. One paper that breaks does not stop the
    others.

    Raises:
        InputError: after the report is written, when papers could not run and their input was wrong in every case.
        WorkError: the same, when one of them broke for another reason; carries the table.
    """
    rows, sections, errors, records = [], [], {}, []
    wrong_input = True
    for paper in papers:
        if settings.scale not in paper.scales:
            errors[paper.package] = f"has no {settings.scale} reproduction (has: {', '.join(paper.scales)})"
            continue
        if len(papers) > 1:
            settings.say(f"{paper.package}: {paper.title}")
        begun = time.monotonic()
        try:
            result = paper.run(dataclasses.replace(settings, out=settings.out / paper.package))
        except Exception as error:
            told = str(error) if isinstance(error, InputError) else repr(error)
            if len(papers) > 1:
                settings.say(f"{paper.package}: failed: {told}")
            errors[paper.package] = told
            wrong_input = wrong_input and isinstance(error, InputError)
            continue
        seconds = time.monotonic() - begun
        table = claims_table(result.claims, title=f"{paper.package}: claims at scale {settings.scale}")
        rows += [(paper.package, *row) for row in table.rows]
        records += [{"package": paper.package, **dataclasses.asdict(claim)} for claim in result.claims]
        text = f"{paper.title} ({paper.reference}). {result.text} Took {seconds:.0f} s."
        sections.append(Section(paper.package, text, (table, *result.tables), result.pictures))
    summary = Table(f"claims at scale {settings.scale}", ("package", *claims_table(()).columns), rows)
    title = "Reproduction of the papers' claims"
    if errors:
        broken = Table("not reproduced", ("package", "why"), list(errors.items()))
        sections.append(Section("Failures", tables=(broken,)))
    facts = environment()
    facts = {"scale": settings.scale, "seed": settings.seed, "python": facts["python"], **facts["packages"]}
    write_html(settings.out / "report.html", title, (Section("Summary", tables=(summary,)), *sections), facts)
    write_markdown(settings.out / "report.md", title, sections)
    write_json(settings.out / "claims.json", {"scale": settings.scale, "claims": records, "errors": errors})
    if errors:
        told = "; ".join(f"{package}: {error}" for package, error in errors.items())
        raise InputError(told) if wrong_input else WorkError(told, result={"claims": summary})
    return summary


def claims_table(claims: Sequence[Claim], title: str = "claims") -> Table:
    columns = ("claim", "statement", "paper", "measured here", "criterion", "holds")
    rows = [(c.name, c.statement, c.paper, c.measured, c.criterion, "yes" if c.holds else "no") for c in claims]
    return Table(title, columns, rows)
