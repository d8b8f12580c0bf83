"""`prance macs`: what a configuration costs, in closed form."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from papercore import cli
from papercore.errors import InputError

from prance.commands.network import static_decision


@dataclasses.dataclass(frozen=True, kw_only=True)
class Macs(cli.Command):
    """Multiply-accumulates, active parameters and tokens of a static configuration.

    One number stands for all blocks or decision points; without any, the largest subnet is counted. Counts are
    canonical (every product once) and as the published code counts them.
    """

    size: Literal["tiny", "small", "base"] = "small"
    """published search space"""
    embed: tuple[int, ...] = ()
    """widths of the blocks, or one; empty: the largest choice"""
    mlp_ratio: tuple[float, ...] = ()
    """MLP ratios of the blocks, or one; empty: the largest choice"""
    prune: tuple[float, ...] = ()
    """shares of tokens that pruning keeps at the decision points, or one; empty: all"""
    merge: tuple[float, ...] = ()
    """shares left after merging, or one; empty: all"""
    image_size: int = 224
    """pixels"""
    patch_size: int = 16
    """pixels"""
    classes: int = 1000
    """outputs of the head"""

    def run(self) -> Mapping[str, Any]:
        from papercore.report import Table

        from prance.decision import Decision
        from prance.macs import Geometry, active_parameters, macs, merge_macs, token_counts
        from prance.space import SearchSpace

        if self.patch_size < 1 or self.image_size < self.patch_size or self.image_size % self.patch_size:
            expected = f"a multiple of the patch size {self.patch_size}"
            raise InputError("--image-size", found=self.image_size, expected=expected)
        if self.classes < 1:
            raise InputError("--classes", found=self.classes, expected="at least 1")
        space = SearchSpace.reference(self.size)

        decision = static_decision(space, self.embed, self.mlp_ratio, self.prune, self.merge)
        tokens = (self.image_size // self.patch_size) ** 2 + 1
        geometry = Geometry(tokens, 1, self.patch_size, 3, self.classes, space.projected)
        rows = []
        lines = {
            "this": decision,
            "largest": Decision.largest(space),
            "smallest, all tokens": Decision.smallest(space),
        }
        for name, one in lines.items():
            left = token_counts(one, geometry)[1][0, -1].item()
            rows.append(
                (
                    name,
                    int(macs(geometry, one)) / 1e9,
                    int(macs(geometry, one, "reference")) / 1e9,
                    int(merge_macs(geometry, one)) / 1e9,
                    int(active_parameters(geometry, one)) / 1e6,
                    left,
                    left / tokens,
                )
            )
        columns = ("subnet", "GMAC", "GMAC as published", "GMAC of merging", "M parameters", "tokens left", "share")
        return {"table": Table(f"{self.size}, {self.image_size} pixels", columns, rows)}
