"""The CIFAR-100 protocol that tables of this field share: pairs, settings of the methods, published accuracies.

Top-1 in percent. Columns "kd" and "dkd" are from the README of mdistiller; the others are recalled from the papers of
DKD and CRD and were not looked up again. The paper's own column for DPK is not available.
"""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class ProtocolPair:
    """A teacher, a student, and what was reached with them."""

    teacher: str
    student: str
    teacher_accuracy: float
    student_accuracy: float
    """trained alone"""
    published: dict[str, float]
    """by method"""
    learning_rate: float = 0.05
    dkd_beta: float = 8.0
    review_weight: float | None = None
    """of ReviewKD, where it is known"""

    @property
    def name(self) -> str:
        """Of the recipe that ships with the package."""
        return f"{self.teacher}-{self.student}"


def _pair(teacher: str, student: str, alone: tuple[float, float], row: tuple[float, ...], **given: Any) -> ProtocolPair:
    names = ("kd", "fitnet", "crd", "reviewkd", "dkd")
    return ProtocolPair(teacher, student, *alone, dict(zip(names, row, strict=True)), **given)


PAIRS = (
    _pair("resnet56", "resnet20", (72.34, 69.06), (70.66, 69.21, 71.16, 71.89, 71.97), dkd_beta=2.0),
    _pair("resnet110", "resnet32", (74.31, 71.14), (73.08, 71.06, 73.48, 73.89, 74.11), dkd_beta=2.0),
    _pair("resnet32x4", "resnet8x4", (79.42, 72.50), (73.33, 73.50, 75.51, 75.63, 76.32), review_weight=5.0),
    _pair("wrn_40_2", "wrn_16_2", (75.61, 73.26), (74.92, 73.58, 75.48, 76.12, 76.23), dkd_beta=6.0),
    _pair("wrn_40_2", "wrn_40_1", (75.61, 71.98), (73.54, 72.24, 74.14, 75.09, 74.81), dkd_beta=6.0),
    _pair("vgg13", "vgg8", (74.64, 70.36), (72.98, 71.02, 73.94, 74.84, 74.68), dkd_beta=6.0),
    _pair("resnet32x4", "shufflenetv1", (79.42, 70.50), (74.07, 73.59, 75.11, 77.45, 76.45), learning_rate=0.01),
    _pair("resnet50", "mobilenetv2", (79.34, 64.60), (67.35, 63.16, 69.11, 69.89, 70.35), learning_rate=0.01),
)


def method_options(method: str, pair: ProtocolPair | None = None) -> dict[str, Any]:
    """The arguments of a method as the protocol has them; for DPK this package's defaults."""
    if method == "kd":
        return {"temperature": 4.0, "ce_weight": 0.1, "weight": 0.9}
    if method == "dkd":
        beta = 8.0 if pair is None else pair.dkd_beta
        return {"alpha": 1.0, "beta": beta, "temperature": 4.0, "warmup": 20}
    if method == "fitnet":
        if pair is None:
            return {"weight": 100.0, "stages": 1}
        return {"weight": 100.0, "pairs": [[stage_name(network, 2) for network in (pair.student, pair.teacher)]]}
    if method == "at":
        return {"weight": 1000.0, "power": 2}
    if method == "reviewkd":
        weight = 5.0 if pair is None or pair.review_weight is None else pair.review_weight
        return {"weight": weight, "warmup": 20, "student_preactivation": False}
    return {}


def stage_name(network: str, stage: int) -> str:
    """The module that ends a stage of a network of the protocol, as its authors number them: 0 is the stem."""
    if network == "mobilenetv2":
        return ("conv1", "blocks.1", "blocks.2", "blocks.4", "blocks.6")[stage]
    if stage == 0 and not network.startswith("vgg"):
        return "conv1"
    return f"{'block' if network.startswith(('vgg', 'wrn')) else 'layer'}{stage}"
