"""The `papercore` command: the reproductions of all installed packages, and the GPU queue."""

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from papercore import cli
from papercore.errors import InputError, WorkError
from papercore.rundir import check_output_folder


def say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reproduce(cli.Command):
    """Re-test the claims of every installed package and write one report."""

    scale: Literal["tiny", "small", "full"] = "tiny"
    """tiny: two CPU cores, minutes, embedded data; small: a GPU, --data; full: the paper's own setting"""
    only: tuple[str, ...] = ()
    """packages to run; all when empty"""
    out: Path = Path("report")
    """folder for report.html, report.md and claims.json"""
    data: Path | None = None
    """folder with data sets, for the scales that need them"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where to compute"""
    seed: int = 0
    """of everything random"""

    def run(self) -> Mapping[str, Any]:
        from papercore.reproduce import Settings, installed, reproduce

        check_output_folder(self.out)
        papers = installed(self.only)
        if not papers:
            raise InputError("no installed package offers a reproduction", hint="install one, for example qdit")
        settings = Settings(self.scale, self.out, self.data, self.device, self.seed, say)
        claims = reproduce(papers, settings)
        return {"claims": claims, "report": self.out / "report.html"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu(cli.Command):
    """Run the work that waits for a GPU, most valuable first, within a time."""

    minutes: float = 25.0
    """time in all; what does not fit is left for the next call"""
    only: tuple[str, ...] = ()
    """packages, or single tasks as package/task; all when empty"""
    results: Path | None = None
    """folder for the raw results; by default each package's benchmarks/results in the checkout around here"""
    data: Path | None = None
    """folder with data sets"""
    list: bool = False
    """only show the queue"""
    retry: bool = False
    """also run again what failed or ran out of time"""
    device: Literal["cuda", "cpu"] = "cuda"
    """cpu tests the queue itself"""
    tiny: bool = False
    """smallest sizes; such results do not count as done"""

    def run(self) -> Mapping[str, Any]:
        from papercore.gpu import EARLIER, Request, list_queue, queue, run_queue

        if self.results is not None:
            check_output_folder(self.results)
        entries = queue(self.results, self.only)
        request = Request(self.device, self.tiny, self.data)
        if self.list:
            return {"queue": list_queue(entries, request)}
        if self.device == "cuda":
            import torch

            if not torch.cuda.is_available():
                raise InputError("--device", found="no CUDA GPU", expected="one", hint="--list shows the queue")
        table = run_queue(entries, self.minutes, request, say, retry=self.retry)
        failed = [row[0] for row in table.rows if row[4] in ("failed", "timeout") and row[5] != EARLIER]
        if failed:
            raise WorkError(f"failed: {', '.join(failed)}", result={"queue": table})
        return {"queue": table}


COMMANDS: dict[str, type[cli.Command]] = {"reproduce": Reproduce, "gpu": Gpu}


def main() -> int:
    return cli.main("papercore", COMMANDS, "Re-tests published claims with every installed package.")


if __name__ == "__main__":
    sys.exit(main())
