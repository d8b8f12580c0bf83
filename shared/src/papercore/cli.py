"""Frozen dataclasses -> command lines.

A command is a frozen dataclass that derives from `Command` and has a `run` method. Its fields are the options; the
same dataclass is built from `--config file.yaml` and from Python. `run` returns a JSON-able mapping (values may be
`papercore.report.Table`), printed for people or, with `--json`, for machines. Nothing heavy is imported here or in a
package's `cli` module; `run` imports what it needs.
"""

import contextlib
import dataclasses
import importlib.metadata
import io
import json
import math
import os
import re
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from papercore.errors import InputError, WorkError

DONE, FAILED, WRONG_INPUT = 0, 1, 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """The options that every command has."""

    config: Path | None = None
    """YAML file with values for the options below; what is given on the command line wins"""
    json: bool = False
    """print the result as JSON"""

    def run(self) -> Mapping[str, Any]:
        """Does the work; the mapping it returns is what is printed."""
        raise TypeError(f"{type(self).__name__} has no run method")


def main(
    program: str, commands: Mapping[str, type[Command]], description: str, arguments: Sequence[str] | None = None
) -> int:
    """Runs one of `commands` and gives the exit code: 0 done, 1 the work failed, 2 input or options are wrong."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    as_json = False
    try:
        if not arguments or arguments[0] in ("-h", "--help"):
            print_commands(program, commands, description)
            return DONE if arguments else WRONG_INPUT
        if arguments[0] == "--version":
            write(f"{program} {importlib.metadata.version(program)}\n")
            return DONE
        name, *rest = arguments
        if name not in commands:
            raise InputError(f"unknown command {name}", where=program, expected=f"one of {', '.join(commands)}")
        command = parse(f"{program} {name}", commands[name], rest)
        if command is None:
            return DONE
        as_json = command.json
        show(command.run(), as_json)
        return DONE
    except InputError as error:
        complain(str(error))
        return WRONG_INPUT
    except WorkError as error:
        if error.result is not None:
            show(error.result, as_json)
        complain(str(error))
        return FAILED
    except BrokenPipeError:
        with contextlib.suppress(BrokenPipeError):
            sys.stdout.close()
        return DONE
    except OSError as error:
        if error.filename is None:
            traceback.print_exc()
            return FAILED
        complain(f"{error.filename}: cannot be used: {error.strerror}")
        return WRONG_INPUT
    except KeyboardInterrupt:
        complain("interrupted")
        return FAILED
    except Exception:
        traceback.print_exc()
        return FAILED


def show(result: Mapping[str, Any], as_json: bool) -> None:
    """Prints a command's result for machines or for people."""
    write(json.dumps(to_json(result), indent=2) + "\n" if as_json else to_text(result))


def parse(program: str, cls: type[Command], arguments: Sequence[str]) -> Command | None:
    """The command built from its arguments and its `--config` file; None after `--help`.

    Raises:
        InputError: unknown option, wrong type, missing value; in the arguments or in the file.
    """
    import tyro

    values = {
        field.name: tyro.MISSING if field.default is dataclasses.MISSING else field.default
        for field in dataclasses.fields(cls)
        if field.default_factory is dataclasses.MISSING
    }
    values |= {
        field.name: field.default_factory()
        for field in dataclasses.fields(cls)
        if field.default_factory is not dataclasses.MISSING
    }
    config = find_config(arguments)
    if config is not None:
        from papercore.config import check, load_yaml

        values |= check(cls, load_yaml(config), config)
    heard = io.StringIO()
    try:
        with contextlib.redirect_stderr(heard):
            command = tyro.cli(
                cls,
                prog=program,
                args=list(arguments),
                default=cls(**values),
                config=(tyro.conf.OmitSubcommandPrefixes,),
            )
        check_values(command)
        return command
    except SystemExit as stop:
        if not stop.code:
            return None
        raise InputError(condense(heard.getvalue()), where=program, hint=f"see {program} --help") from None


def check_values(command: Command) -> None:
    """Raises InputError for what no command can use: seeds that torch does not take, paths with a null character."""
    seed = getattr(command, "seed", 0)
    if not 0 <= seed < 2**63:
        raise InputError("--seed", found=seed, expected="0 to 2^63 - 1")
    for field in dataclasses.fields(command):
        if "\0" in str(getattr(command, field.name)):
            raise InputError(f"--{field.name}", found="a null character", expected="none")


def find_config(arguments: Sequence[str]) -> Path | None:
    """The value of `--config`, read before the other options because it gives their defaults."""
    found: list[str] = []
    for position, argument in enumerate(arguments):
        if argument.startswith("--config="):
            found.append(argument.partition("=")[2])
        if argument == "--config" and position + 1 < len(arguments):
            found.append(arguments[position + 1])
    if len(found) > 1 or found == [""]:
        raise InputError("--config", found=" and ".join(found) or "nothing", expected="one file")
    return Path(found[0]) if found else None


def condense(message: str) -> str:
    """tyro's framed message as one line, without the frame, its title and the advice below the rule.

    Where the terminal has no box characters, the title is the first line and a rule of dashes follows it.
    """
    boxed = "│" in message
    lines = [line.strip("│ ") for line in message.splitlines() if line.startswith("│") or not boxed]
    blocks: list[list[str]] = [[]]
    for line in lines:
        if re.fullmatch(r"[─-]{3,}", line):
            blocks.append([])
        else:
            blocks[-1].append(line)
    kept = blocks[0] if boxed or len(blocks) == 1 else blocks[1]
    return " ".join(" ".join(kept).split()).rstrip(".") or " ".join(message.split())


def print_commands(program: str, commands: Mapping[str, type[Command]], description: str) -> None:
    """The overview: what the program is for and a line for every command."""
    width = max(len(name) for name in commands)
    lines = [f"usage: {program} COMMAND [OPTIONS]", "", description, "", "commands:"]
    for name, cls in commands.items():
        lines.append(f"  {name:<{width}}  {(cls.__doc__ or '').strip().splitlines()[0]}")
    lines += ["", f"'{program} COMMAND --help' shows a command's options; '{program} --version' the version.", ""]
    write("\n".join(lines))


def unfinished(program: str) -> int:
    """The whole command line of a package that has no working part yet."""
    if sys.argv[1:] == ["--version"]:
        write(f"{program} {importlib.metadata.version(program)}\n")
        return DONE
    complain(f"{program} has no working part yet")
    return WRONG_INPUT


def to_json(value: Any) -> Any:
    """`value` as JSON can hold it: paths as text, tables as lists of records, NaN as null, infinity as text."""
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if hasattr(value, "records"):
        return to_json(value.records())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_json(dataclasses.asdict(value))
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if value != value else str(value)
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def to_text(result: Mapping[str, Any]) -> str:
    """`result` for people: tables as tables, everything else as `key: value`."""
    parts = []
    for key, value in result.items():
        if hasattr(value, "to_terminal"):
            parts.append(value.to_terminal())
        elif isinstance(value, Mapping):
            parts += [f"{key}:"] + [f"  {name}: {format_value(item)}" for name, item in value.items()]
        else:
            parts.append(f"{key}: {format_value(value)}")
    return "\n".join(parts) + "\n"


def format_value(value: Any) -> str:
    """Numbers with four significant digits, everything else as it is."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(format_value(item) for item in value)
    return str(value)


def write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def complain(text: str) -> None:
    """One line on standard error, from the first of several processes only."""
    if os.environ.get("RANK", "0") == "0":
        sys.stderr.write(f"error: {text}\n")
