"""A run's folder: its configuration, its environment, its log, and files that are whole or absent.

config.json        the configuration; a run goes on only under the same one
environment.json   versions and machine, for the reader of old runs
log.jsonl          one JSON object a line, append-only; a torn last line is dropped
"""

import contextlib
import dataclasses
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from papercore.errors import InputError, located


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`; renamed to `path` when the block ends well, removed when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def check_output_folder(path: Path) -> None:
    """Checks an output folder before the work begins, so that a wrong one costs no work; makes nothing.

    Raises:
        InputError: it is a file, lies in one, or may not be written to.
    """
    for part in (path, *path.absolute().parents):
        if part.exists():
            if not part.is_dir():
                raise InputError("is a file", where=part, expected="a folder")
            if not os.access(part, os.W_OK):
                raise InputError("may not be written to", where=part, expected="a folder of yours")
            return


def check_output_file(path: Path, suffix: str = "") -> None:
    """The same for an output file.

    Raises:
        InputError: it is a folder, has another suffix than `suffix`, or its folder is no place for it.
    """
    if path.is_dir() or not path.name:
        raise InputError("is a folder", where=path, expected=f"a file {suffix}".rstrip())
    if suffix and path.suffix != suffix:
        raise InputError("name of the output", where=path, found=path.suffix or "no suffix", expected=suffix)
    check_output_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, sort_keys=True, default=str) + "\n")


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        InputError: unreadable, or not JSON; names file and line.
    """
    try:
        with located(path):
            return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot be read: {getattr(error, 'strerror', None) or error}", where=path) from error
    except json.JSONDecodeError as error:
        raise InputError(
            "not JSON", where=f"{path}:{error.lineno}", found=error.msg, expected="a JSON value"
        ) from error


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; a key that is given twice is an error and not silently the last one."""
    made = dict(pairs)
    if len(made) != len(pairs):
        twice = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
        raise InputError(f"key {twice}", found="given twice", expected="given once")
    return made


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Adds one record. A torn last line left by a crash is cut off first, so that it never swallows this one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    drop_torn_line(path)
    with path.open("ab") as file:
        file.write(json.dumps(record, default=str).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def drop_torn_line(path: Path) -> None:
    """Cuts off what follows the last newline of a log."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        end = file.seek(0, os.SEEK_END)
        if end:
            file.seek(end - 1)
            if file.read(1) != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a log; an absent log has none, a torn last line is dropped.

    Raises:
        InputError: a line other than the last is not JSON; names file and line.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last newline is empty or torn
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise InputError(
                f"not JSON: {error}", where=f"{path}:{number}", expected="one JSON object a line"
            ) from error
    return records


@dataclasses.dataclass(frozen=True)
class RunDir:
    """The folder of one run."""

    path: Path

    @classmethod
    def open(cls, path: Path, config: Mapping[str, Any], *, resume: bool = True) -> "RunDir":
        """Begins a run in `path`, or goes on with the one that is there.

        Raises:
            InputError: the folder holds a run with another configuration, or `path` is a file.
        """
        run = cls(path)
        for leftover in path.glob(".*.????????"):  # of processes that died while they wrote
            leftover.unlink(missing_ok=True)
        if path.exists() and not path.is_dir():
            raise InputError("is a file", where=path, expected="a folder")
        wanted = json.loads(json.dumps(config, default=str))
        if not resume:
            for name in ("config.json", "log.jsonl", "environment.json"):
                (path / name).unlink(missing_ok=True)
        if (path / "config.json").exists():
            before, now = flatten(read_json(path / "config.json")), flatten(wanted)
            for key in sorted(set(before) | set(now)):
                if before.get(key) != now.get(key):
                    raise InputError(
                        f"field {key}",
                        where=path / "config.json",
                        found=repr(before.get(key)),
                        expected=repr(now.get(key)),
                        hint="this folder holds another run: choose another folder, or --no-resume to start anew",
                    )
        else:
            write_json(path / "environment.json", environment())
            write_json(path / "config.json", wanted)
        return run

    @property
    def log_path(self) -> Path:
        return self.path / "log.jsonl"

    def log(self, record: Mapping[str, Any]) -> None:
        append_line(self.log_path, record)

    def records(self) -> list[dict[str, Any]]:
        return read_lines(self.log_path)

    def keep_records(self, keep: Callable[[dict[str, Any]], bool]) -> None:
        """Rewrites the log with the records that `keep` accepts (those a resumed run will not write again)."""
        if self.log_path.exists():
            write_text(self.log_path, "".join(json.dumps(record) + "\n" for record in self.records() if keep(record)))


def flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with names joined by dots."""
    if not isinstance(values, Mapping):
        return {prefix.rstrip("."): values}
    return {key: leaf for name, value in values.items() for key, leaf in flatten(value, f"{prefix}{name}.").items()}


def environment() -> dict[str, Any]:
    """Versions and machine, without names or paths of the machine."""
    import importlib.metadata

    names = ("papercore", "torch", "numpy", "diffusers", "accelerate", "triton")
    versions = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "python": sys.version.split()[0],
        "system": platform.system(),
        "machine": platform.machine(),
        "processors": os.cpu_count(),
        "packages": versions,
    }


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
