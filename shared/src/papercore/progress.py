"""Progress of long work on standard error: a bar on a terminal, a line now and then in a log."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


class Progress:
    """Counts `total` steps under a `label`; `advance` is cheap enough for every step of a loop.

    Args:
        label: what is being done.
        total: how many steps there are.
        start: steps done before (a resumed run).
        every: seconds between two lines when standard error is not a terminal.
        show: False silences it (all but one of several processes).
    """

    def __init__(self, label: str, total: int, *, start: int = 0, every: float = 10.0, show: bool = True) -> None:
        self.label, self.total, self.done, self.every = label, total, start, every
        self.begun = self.said = time.monotonic()
        self.start = start
        self.show = show
        self.bar = None
        if show and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as RichProgress

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self.bar = RichProgress(*columns, console=Console(stderr=True), transient=True)
            self.task = self.bar.add_task(label, total=total, completed=start)
            self.bar.start()

    def advance(self, note: str = "") -> None:
        self.done += 1
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done, description=f"{self.label} {note}".rstrip())
        elif self.show and time.monotonic() - self.said >= self.every:
            self.said = time.monotonic()
            left = (self.said - self.begun) / (self.done - self.start) * (self.total - self.done)
            sys.stderr.write(f"{self.label}: {self.done}/{self.total} {note} ({left:.0f} s left)\n")

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def track(items: Iterable[T], label: str, total: int) -> Iterator[T]:
    """`items`, with progress."""
    with Progress(label, total) as progress:
        for item in items:
            yield item
            progress.advance()
