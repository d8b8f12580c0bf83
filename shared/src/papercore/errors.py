"""The exceptions a user sees as one line instead of a traceback."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any


class InputError(ValueError):
    """Something the user gave is wrong: a file, an option, a value. Ends a command with exit code 2.

    Callers in Python may catch it as the `ValueError` that it is.

    Args:
        what: the field, key, tensor or option that is wrong, or a whole sentence.
        where: the file (and line) or the option it was read from.
        found: the value met; omitted when it says nothing.
        expected: what would have been right.
        hint: how to get there.
    """

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        found: Any = None,
        expected: object = None,
        hint: str | None = None,
    ) -> None:
        self.what, self.where, self.found, self.expected, self.hint = what, where, found, expected, hint
        super().__init__(str(self))

    def __str__(self) -> str:
        line = f"{self.where}: {self.what}" if self.where is not None else self.what
        details = []
        if self.found is not None:
            details.append(f"found {shorten(self.found)}")
        if self.expected is not None:
            details.append(f"expected {self.expected}")
        if details:
            line += ": " + ", ".join(details)
        if self.hint:
            line += f" ({self.hint})"
        return " ".join(line.split())


class WorkError(Exception):
    """The input was right and the work failed all the same (training diverged, a worker died). Exit code 1.

    Args:
        what: one line.
        result: what there is to show in spite of it; printed like the result of a command.
    """

    def __init__(self, what: str, result: Mapping[str, Any] | None = None) -> None:
        super().__init__(what)
        self.result = result


@contextlib.contextmanager
def located(where: object) -> Iterator[None]:
    """Adds the file (or option) to the input errors that do not name one yet."""
    try:
        yield
    except InputError as error:
        if error.where is not None:
            raise
        raise InputError(
            error.what, where=where, found=error.found, expected=error.expected, hint=error.hint
        ) from error


def shorten(value: Any, limit: int = 120) -> str:
    """A value as it may stand in a one-line message: text bare, the rest as Python writes it, long things cut."""
    text = value if isinstance(value, str) and value else repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
