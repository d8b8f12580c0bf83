"""A paper's claims, re-tested. A package offers one `Paper` through the entry point group `papercore.papers`."""

import dataclasses
import importlib.metadata
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from papercore.errors import InputError
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
    return [found[name].load() for name in sorted(only or found)]


def reproduce(papers: Sequence[Paper], settings: Settings) -> tuple[Table, dict[str, str]]:
    """Runs the papers one after another; gives the table of claims and the errors of those that broke.

    Writes `report.html`, `report.md` and `claims.json` into `settings.out`. One paper that breaks does not stop the
    others.
    """
    rows, sections, errors, records = [], [], {}, []
    for paper in papers:
        if settings.scale not in paper.scales:
            errors[paper.package] = f"has no {settings.scale} reproduction (has: {', '.join(paper.scales)})"
            continue
        settings.say(f"{paper.package}: {paper.title}")
        begun = time.monotonic()
        try:
            result = paper.run(dataclasses.replace(settings, out=settings.out / paper.package))
        except InputError:
            raise
        except Exception as error:
            settings.say(f"{paper.package}: failed: {error!r}")
            errors[paper.package] = repr(error)
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
    return summary, errors


def claims_table(claims: Sequence[Claim], title: str = "claims") -> Table:
    columns = ("claim", "statement", "paper", "measured here", "criterion", "holds")
    rows = [(c.name, c.statement, c.paper, c.measured, c.criterion, "yes" if c.holds else "no") for c in claims]
    return Table(title, columns, rows)


def reproduction_result(summary: Table, errors: dict[str, str], out: Path) -> dict[str, object]:
    """What a `reproduce` command prints."""
    result: dict[str, object] = {"claims": summary}
    if errors:
        result["failed"] = errors
    return {**result, "report": out / "report.html"}
