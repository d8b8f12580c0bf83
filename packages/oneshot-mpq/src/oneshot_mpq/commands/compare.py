"""What differs between two configurations."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from papercore import cli

from oneshot_mpq.commands.options import Positional


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compare(cli.Command):
    """Show the layers whose bits differ between two configurations, and their costs side by side."""

    first: Positional[Path]
    """JSON file of a configuration"""
    second: Positional[Path]
    """another one of the same model"""

    def run(self) -> Mapping[str, Any]:
        from oneshot_mpq.bitconfig import BitConfig
        from oneshot_mpq.report import compare

        layers, totals = compare(BitConfig.load(self.first), BitConfig.load(self.second))
        return {"layers": layers, "totals": totals}
