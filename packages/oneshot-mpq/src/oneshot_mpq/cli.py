"""The `oneshot-mpq` command. It has no sub-command yet and says so."""

from papercore.cli import unfinished


def main() -> int:
    return unfinished("oneshot-mpq")
