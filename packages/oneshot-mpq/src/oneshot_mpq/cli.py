"""The `oneshot-mpq` command."""

import sys

from papercore import cli

from oneshot_mpq.commands.benchmark import Benchmark
from oneshot_mpq.commands.compare import Compare
from oneshot_mpq.commands.evaluate import Evaluate
from oneshot_mpq.commands.export import Export
from oneshot_mpq.commands.inspect import Inspect
from oneshot_mpq.commands.profile import Profile
from oneshot_mpq.commands.reproduce import Reproduce
from oneshot_mpq.commands.search import Search
from oneshot_mpq.commands.train import Train

COMMANDS: dict[str, type[cli.Command]] = {
    "profile": Profile,
    "train": Train,
    "search": Search,
    "evaluate": Evaluate,
    "export": Export,
    "compare": Compare,
    "inspect": Inspect,
    "reproduce": Reproduce,
    "benchmark": Benchmark,
}


def main() -> int:
    return cli.main(
        "oneshot-mpq", COMMANDS, "Trains a network once for all bit-widths and finds the bits of every layer."
    )


if __name__ == "__main__":
    sys.exit(main())
