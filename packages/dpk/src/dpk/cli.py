"""The `dpk` command."""

import sys

from papercore import cli

from dpk.commands.comparing import CKA, Benchmark, Compare, ConvertConfig
from dpk.commands.evaluate import Evaluate
from dpk.commands.reproduce import Reproduce
from dpk.commands.select_teacher import SelectTeacher
from dpk.commands.train import Train

COMMANDS: dict[str, type[cli.Command]] = {
    "train": Train,
    "evaluate": Evaluate,
    "compare": Compare,
    "select-teacher": SelectTeacher,
    "cka": CKA,
    "convert-config": ConvertConfig,
    "benchmark": Benchmark,
    "reproduce": Reproduce,
}


def main() -> int:
    return cli.main("dpk", COMMANDS, "Distils networks with dynamic prior knowledge (DPK) and the usual methods.")


if __name__ == "__main__":
    sys.exit(main())
