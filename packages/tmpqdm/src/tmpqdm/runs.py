"""What a search leaves in its folder, and how it is read back.

plan-NAME.json       the plan of a budget
search-NAME.json     every scored candidate, the finalists, and rank correlations
run.json             what was searched: model, solver, groups
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from papercore.errors import InputError
from papercore.rundir import read_json, write_json

from tmpqdm.plan import Plan

if TYPE_CHECKING:
    from tmpqdm.joint import SearchResult


@dataclasses.dataclass(frozen=True)
class Found:
    """One budget's search, read back."""

    name: str
    plan: Plan
    archive: list[dict[str, Any]]
    """scored candidates in order: genes, fitness (may be infinite), bitops of an image, notes"""
    finalists: list[dict[str, Any]]
    rungs: list[dict[str, Any]]
    correlation: float | None


def write_found(folder: Path, name: str, result: "SearchResult") -> None:
    """Writes plan and archive of one budget."""
    from tmpqdm.joint import plan_bitops

    archive = [
        {
            "genes": {g: choices[i] for (g, choices), i in zip(result.space.genes.items(), e.genome, strict=True)},
            "fitness": e.fitness if math.isfinite(e.fitness) else None,
            "bitops": plan_bitops(result.space, e.genome),
            "notes": dict(e.notes),
        }
        for e in result.evaluations
    ]
    record = {
        "archive": archive,
        "finalists": result.finalists,
        "rungs": [dataclasses.asdict(rung) for rung in result.rungs],
        "correlation": result.correlation,
        "drawn at random for want of new candidates": result.crowded,
    }
    write_json(folder / f"search-{name}.json", record)
    result.plan.save(folder / f"plan-{name}.json")


def read_found(folder: Path, name: str) -> Found:
    """Raises InputError for files that are missing or damaged."""
    plan, path = Plan.load(folder / f"plan-{name}.json"), folder / f"search-{name}.json"
    record = read_json(path)
    try:
        archive = [
            {**entry, "fitness": math.inf if entry["fitness"] is None else float(entry["fitness"])}
            for entry in record["archive"]
        ]
        return Found(name, plan, archive, record["finalists"], record["rungs"], record["correlation"])
    except (TypeError, KeyError, ValueError) as error:
        raise InputError("search record", where=path, found=repr(error), expected="what a search writes") from error


def write_run(folder: Path, values: Mapping[str, Any]) -> None:
    write_json(folder / "run.json", dict(values))


def read_run(folder: Path) -> dict[str, Any]:
    """Raises InputError for a folder that is no finished search."""
    path = folder / "run.json"
    if not path.exists():
        raise InputError("run", where=folder, found="no run.json", expected="the folder of a finished search")
    values = read_json(path)
    if not isinstance(values, dict) or not isinstance(values.get("budgets"), list):
        raise InputError("run", where=path, found="other fields", expected="what a search writes")
    return values
