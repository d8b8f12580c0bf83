"""The queue of work that waits for a GPU: checks, benchmarks, small-scale reproductions.

A package lists its tasks through the entry point group `papercore.gpu`: a function that gives `Task`s. `papercore gpu`
runs the pending ones, most valuable first, within a time. Each task runs in a process of its own, so that a crash or a
hang costs that task only; its result is written when it ends, so that the queue can be cut off at any time and called
again. A task is done when `benchmarks/results/<task>.json` of its package says so for the task's present version.
"""

import dataclasses
import importlib.metadata
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from papercore.errors import InputError
from papercore.report import Table
from papercore.rundir import environment, read_json, write_json

GROUP = "papercore.gpu"
EARLIER = "from an earlier call"
COLUMNS = ("task", "kind", "value", "minutes", "status", "note")
Status = Literal["done", "failed", "timeout", "pending"]


@dataclasses.dataclass(frozen=True)
class Request:
    """What a task is told."""

    device: str
    """"cuda", or "cpu" when the queue itself is tested"""
    tiny: bool
    """smallest sizes: does the code run at all?"""
    data: Path | None
    """folder of data sets, for the tasks that need one"""


@dataclasses.dataclass(frozen=True)
class Task:
    """One piece of work for the GPU.

    `run` gives a JSON-able mapping with the raw numbers; it raises when a check fails.
    """

    name: str
    """unique in its package, for example "check-quantisers" """
    kind: Literal["check", "benchmark", "reproduction"]
    value: int
    """the larger, the earlier"""
    minutes: float
    """what it is expected to take; a task is given three times as long, if there is time"""
    run: Callable[[Request], Mapping[str, Any]]
    version: int = 1
    """raise it when an old result no longer counts"""
    requires: tuple[str, ...] = ()
    """modules that must be importable, besides torch"""
    needs_data: bool = False


@dataclasses.dataclass(frozen=True)
class Entry:
    """A task in the queue and where its result is."""

    package: str
    task: Task
    folder: Path

    @property
    def name(self) -> str:
        return f"{self.package}/{self.task.name}"

    def result(self, request: Request) -> Path:
        """Where the result is kept; trials on the CPU or at tiny size never touch that of a GPU."""
        kind = (".cpu" if request.device == "cpu" else "") + (".tiny" if request.tiny else "")
        return self.folder / f"{self.task.name}{kind}.json"

    def status(self, request: Request) -> Status:
        """Of the task's present version.

        Raises:
            InputError: the result file is damaged.
        """
        path = self.result(request)
        if not path.exists():
            return "pending"
        record = read_json(path)
        if not isinstance(record, dict) or record.get("status") not in ("done", "failed", "timeout"):
            raise InputError("status", where=path, found=str(record)[:60], expected="the record of a task")
        return record["status"] if record.get("version") == self.task.version else "pending"


def queue(results: Path | None = None, only: Sequence[str] = ()) -> list[Entry]:
    """All registered tasks, most valuable first.

    Args:
        results: a folder that gets one folder a package; None puts results into the packages' own folders
            (`shared/` or `packages/<name>/`, then `benchmarks/results/`) of the checkout around the working directory.
        only: packages, or single tasks as package/task.

    Raises:
        InputError: `only` names nothing that exists.
    """
    entries = []
    for point in importlib.metadata.entry_points(group=GROUP):
        folder = results / point.name if results is not None else results_folder(point.name)
        entries += [Entry(point.name, task, folder) for task in point.load()()]
    for name in only:
        if not any(name in (entry.package, entry.name) for entry in entries):
            raise InputError("--only", found=name, expected=f"one of {', '.join(sorted({e.package for e in entries}))}")
    if only:
        entries = [entry for entry in entries if entry.package in only or entry.name in only]
    return sorted(entries, key=lambda entry: (-entry.task.value, entry.name))


def results_folder(package: str) -> Path:
    """Where a package's results are kept in the checkout around the working directory."""
    for root in (Path.cwd(), *Path.cwd().parents):
        for folder in (root / "packages" / package, root / "shared" if package == "papercore" else None):
            if folder is not None and (folder / "pyproject.toml").exists():
                return folder / "benchmarks" / "results"
    raise InputError(
        "no checkout of the workspace around the working directory",
        where=Path.cwd(),
        hint="give a folder for the results with --results",
    )


def run_queue(
    entries: Sequence[Entry], minutes: float, request: Request, say: Callable[[str], None], *, retry: bool = False
) -> Table:
    """Runs what is pending and fits; gives a table of all entries.

    Args:
        minutes: time in all. A task whose expected time does not fit any more is left for the next call.
        retry: also run again what failed or ran out of time before.
    """
    if not minutes > 0 or minutes == float("inf"):
        raise InputError("--minutes", found=minutes, expected="a number above 0")
    if request.data is not None and not request.data.is_dir():
        raise InputError("--data", found=str(request.data), expected="a folder")
    deadline = time.monotonic() + 60 * minutes
    rows = []
    for entry in entries:
        task, status, note = entry.task, entry.status(request), ""
        left = deadline - time.monotonic()
        if status == "done" or (status != "pending" and not retry):
            note = EARLIER
        elif lacking(task, request):
            note = lacking(task, request)
        elif left < 60 * task.minutes * (0.01 if request.tiny else 1):
            note = f"needs {task.minutes:g} min, {max(0.0, left) / 60:.1f} left"
        else:
            say(f"{entry.name}: started ({task.minutes:g} min expected, {left / 60:.1f} left)")
            own = max(60.0, 180 * task.minutes)
            status, note = run_one(entry, min(left, own), request, final=left >= own)
            say(f"{entry.name}: {status} {note}")
        rows.append((entry.name, task.kind, task.value, task.minutes, status, note))
    return Table("GPU queue", COLUMNS, rows)


def list_queue(entries: Sequence[Entry], request: Request) -> Table:
    """The queue as it stands, without running anything."""
    rows = [
        (e.name, e.task.kind, e.task.value, e.task.minutes, e.status(request), lacking(e.task, request))
        for e in entries
    ]
    return Table("GPU queue", COLUMNS, rows)


def lacking(task: Task, request: Request) -> str:
    """What a task needs and this machine or call does not have; empty when it could run."""
    missing = [name for name in task.requires if importlib.util.find_spec(name) is None]
    if task.needs_data and request.data is None:
        missing.append("--data")
    return f"needs {', '.join(missing)}" if missing else ""


def run_one(entry: Entry, seconds: float, request: Request, *, final: bool = True) -> tuple[Status, str]:
    """Runs one task in a process of its own and writes its record.

    Args:
        seconds: time for it.
        final: whether running out of time is the task's fault; if not, it stays pending and nothing is written.
    """
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        outcome = Path(folder) / "outcome.json"
        command = [sys.executable, "-m", "papercore.gpu", entry.package, entry.task.name, request.device]
        command += [str(int(request.tiny)), str(request.data or ""), str(outcome)]
        try:
            done = subprocess.run(command, timeout=seconds, capture_output=True, text=True, check=False)  # noqa: S603
            status: Status = "done" if done.returncode == 0 else "failed"
            said = (done.stderr or "").strip()
        except subprocess.TimeoutExpired:
            if not final:
                return "pending", f"cut off after {seconds:.0f} s by the end of the queue's time"
            status, said = "timeout", f"stopped after {seconds:.0f} s"
        result = json.loads(outcome.read_text()) if outcome.exists() else None
    taken = time.monotonic() - begun
    record = {
        "task": entry.task.name,
        "version": entry.task.version,
        "tiny": request.tiny,
        "status": status,
        "seconds": round(taken, 2),
        "device": (result or {}).pop("device", None),
        "environment": environment(),
        "result": result,
        "error": None if status == "done" else said[-4000:],
    }
    write_json(entry.result(request), record)
    return status, f"{taken:.0f} s" if status == "done" else said.splitlines()[-1] if said else ""


def _task_process(arguments: Sequence[str]) -> None:
    """The child: runs one task and leaves its numbers in a file."""
    package, name, device, tiny, data, outcome = arguments
    import torch

    (point,) = importlib.metadata.entry_points(group=GROUP, name=package)
    (task,) = (task for task in point.load()() if task.name == name)
    result = dict(task.run(Request(device, tiny == "1", Path(data) if data else None)))
    result["device"] = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    temporary = f"{outcome}.part"
    Path(temporary).write_text(json.dumps(result, default=str))
    Path(temporary).replace(outcome)


if __name__ == "__main__":
    _task_process(sys.argv[1:])
