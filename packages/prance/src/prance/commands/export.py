"""`prance export`: a static subnet as ONNX."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import tyro
from papercore import cli
from papercore.rundir import check_output_file

from prance.commands.network import open_network, static_decision


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export(cli.Command):
    """Cut one static subnet out of a meta-network and write it as ONNX, checked with onnxruntime.

    One number stands for all blocks or decision points; the default is the largest choice and all tokens.
    """

    model: tyro.conf.Positional[str]
    """name of a timm vision transformer, or a file of published weights (with --size)"""
    out: Path
    """ONNX file"""
    size: Literal["tiny", "small", "base"] | None = None
    """space of published weights"""
    pretrained: bool = False
    """download the timm model's weights; random ones otherwise"""
    embed: tuple[int, ...] = ()
    """widths of the blocks"""
    mlp_ratio: tuple[float, ...] = ()
    """MLP ratios of the blocks"""
    prune: tuple[float, ...] = ()
    """shares of tokens that pruning keeps at the decision points"""
    merge: tuple[float, ...] = ()
    """shares left after merging"""
    reduce: Literal["mean", "size_mean"] = "mean"
    """how merged tokens are averaged"""
    opset: int = 17
    """of ONNX"""
    tolerance: float = 1e-4
    """largest difference from torch, as a share of the largest logit or of 1"""

    def run(self) -> Mapping[str, Any]:
        from prance.export import StaticViT, export_onnx

        check_output_file(self.out)
        net = open_network(self.model, self.size, pretrained=self.pretrained)
        decision = static_decision(net.space, self.embed, self.mlp_ratio, self.prune, self.merge)
        exported = export_onnx(
            StaticViT(net, decision, self.reduce), self.out, opset=self.opset, tolerance=self.tolerance
        )
        return dataclasses.asdict(exported)
