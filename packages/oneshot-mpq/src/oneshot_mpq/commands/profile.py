"""What the layers of a network cost."""

import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from papercore import cli
from papercore.errors import InputError

from oneshot_mpq.commands.options import Positional, parse_bits


@dataclasses.dataclass(frozen=True, kw_only=True)
class Profile(cli.Command):
    """Show layers, bit operations and sizes: of a model by name at uniform widths, or of a configuration.

    Nothing is trained or downloaded; the costs depend on shapes alone.
    """

    model: Positional[str]
    """digits, cifar-resnet20 (8, 32, 44, 56, 110), a model of timm, or a folder that train wrote"""
    bitconfig: Path | None = None
    """JSON file of a configuration; none: uniform widths"""
    bits: str = "2,3,4,5,6"
    """candidates, for a model by name"""
    size: int = 0
    """height and width of the input; 0: 8 for digits, 32 for CIFAR's networks, 224"""
    classes: int = 1000
    """of the classifier, for a model of timm"""

    def run(self) -> Mapping[str, Any]:
        if self.size < 0 or self.classes < 1:
            raise InputError("--size, --classes", found=min(self.size, self.classes), expected="at least 1")
        bits = parse_bits(self.bits)
        import torch
        from papercore.report import Table

        from oneshot_mpq.bitconfig import BitConfig
        from oneshot_mpq.checkpoint import load_supernet
        from oneshot_mpq.models import build_model
        from oneshot_mpq.report import report
        from oneshot_mpq.supernet import Supernet

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # layers without batch norm, and widths that depthwise layers lack
            if Path(self.model).is_dir():
                net = load_supernet(Path(self.model))
            else:
                small = self.model == "digits" or self.model.startswith("cifar-")
                channels, size = (1, 8) if self.model == "digits" else (3, 32 if small else 224)
                model = build_model(self.model, 10 if small else self.classes, channels).eval()
                size = self.size or size
                generator = torch.Generator().manual_seed(0)  # numbers, so that signs of inputs are observed
                example = torch.randn(1, channels, size, size, generator=generator)
                net = Supernet(model, example, bits, name=self.model)
            chosen = BitConfig.load(self.bitconfig) if self.bitconfig else None
            layers, totals = report(net, chosen)
            found: dict[str, Any] = {"layers": layers, "totals": totals}
            if chosen is None:
                rows = []
                for b in net.bits:
                    uniform = BitConfig.uniform(net, b, b)
                    rows.append((f"W{b}A{b}", uniform.bitops_G, uniform.size_MiB))
                found["uniform"] = Table("uniform widths", ("bits", "BitOps (G)", "size (MiB)"), rows)
        return found
