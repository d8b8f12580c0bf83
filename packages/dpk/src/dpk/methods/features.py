"""Distillation of features by regression and by attention: FitNet (Romero et al., arXiv 1412.6550) and attention
transfer (Zagoruyko & Komodakis, arXiv 1612.03928)."""

from collections.abc import Sequence
from typing import Any, Literal

import torch.nn.functional as F
from jaxtyping import Float
from papercore.errors import InputError
from torch import Tensor, nn

from dpk.method import FeatureInfo, Method, Outputs, PairLike
from dpk.methods.logits import check_positive


def attention_map(features: Float[Tensor, "batch channels h w"], power: int = 2) -> Float[Tensor, "batch hw"]:
    """Mean over channels of |F|^power, flattened, with Euclidean norm 1 for every image."""
    return F.normalize(features.abs().pow(power).mean(1).flatten(1))


def at_loss(
    student: Sequence[Float[Tensor, "batch channels h w"]],
    teacher: Sequence[Float[Tensor, "batch channels2 h2 w2"]],
    power: int = 2,
) -> Float[Tensor, ""]:
    """Sum over pairs of the mean squared difference of their attention maps; the larger map is averaged down."""
    return sum((at_pair(s, t, power) for s, t in zip(student, teacher, strict=True)), student[0].new_zeros(()))


def at_pair(student: Tensor, teacher: Tensor, power: int = 2) -> Float[Tensor, ""]:
    """Of one pair, see `at_loss`."""
    size = (min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3]))
    maps = [x if tuple(x.shape[2:]) == size else F.adaptive_avg_pool2d(x, size) for x in (student, teacher)]
    return (attention_map(maps[0], power) - attention_map(maps[1], power)).square().mean()


class AttentionTransfer(Method):
    """Where the teacher's channels are active, the student's should be.

    Args:
        weight: of the sum over pairs; 1000 is usual on CIFAR.
        power: of the activations.
    """

    def __init__(
        self,
        *,
        weight: float = 1000.0,
        power: int = 2,
        pairs: Literal["auto"] | Sequence[PairLike] = "auto",
        stages: int | Literal["all"] = "all",
        preactivation: bool = False,
        ce_weight: float = 1.0,
        warmup: int = 0,
    ) -> None:
        super().__init__(pairs=pairs, stages=stages, preactivation=preactivation, ce_weight=ce_weight, warmup=warmup)
        check_positive(weight=weight)
        if power < 1:
            raise InputError("power", found=power, expected="at least 1")
        self.weight, self.power = weight, power

    def forward(self, student: Outputs, teacher: Outputs, targets: Any, *, generator: Any) -> dict[str, Tensor]:
        losses = self.cross_entropy(student, targets)
        for i, (s, t) in enumerate(zip(student.features, teacher.features, strict=True)):
            losses[f"at_{i}"] = self.warm * self.weight * at_pair(s.float(), t.float(), self.power)
        return losses


class Regressor(nn.Module):
    """A convolution from the student's map to the teacher's size and channels, batch norm, ReLU.

    Half the student's size: 3 x 3 with stride 2; twice it: transposed 4 x 4 with stride 2; otherwise a convolution
    without padding whose kernel makes up the difference.

    Raises:
        InputError: the teacher's map is larger in another ratio.
    """

    def __init__(self, student: FeatureInfo, teacher: FeatureInfo, relu: bool = True) -> None:
        super().__init__()
        (h, w), (th, tw) = (student.height, student.width), (teacher.height, teacher.width)
        if (h, w) == (2 * th, 2 * tw):
            conv: nn.Module = nn.Conv2d(student.channels, teacher.channels, 3, stride=2, padding=1)
        elif (2 * h, 2 * w) == (th, tw):
            conv = nn.ConvTranspose2d(student.channels, teacher.channels, 4, stride=2, padding=1)
        elif h >= th and w >= tw:
            conv = nn.Conv2d(student.channels, teacher.channels, (1 + h - th, 1 + w - tw))
        else:
            raise InputError(
                f"FitNet's regressor from {student.name} to {teacher.name}",
                found=f"{h} x {w} to {th} x {tw}",
                expected="a map not smaller than the teacher's, or exactly half of it",
            )
        self.conv, self.norm, self.relu = conv, nn.BatchNorm2d(teacher.channels), relu

    def forward(self, x: Float[Tensor, "batch channels h w"]) -> Float[Tensor, "batch channels2 h2 w2"]:
        x = self.norm(self.conv(x))
        return F.relu(x) if self.relu else x


class FitNet(Method):
    """The student's features, through a regressor, should be the teacher's.

    Args:
        weight: of every pair's mean squared error; 100 is usual on CIFAR, with one pair in the middle.
        relu: end the regressor with a ReLU, for targets that end with one; none: where `preactivation` is off.
    """

    def __init__(
        self,
        *,
        weight: float = 100.0,
        relu: bool | None = None,
        pairs: Literal["auto"] | Sequence[PairLike] = "auto",
        stages: int | Literal["all"] = 2,
        preactivation: bool = False,
        ce_weight: float = 1.0,
        warmup: int = 0,
    ) -> None:
        super().__init__(pairs=pairs, stages=stages, preactivation=preactivation, ce_weight=ce_weight, warmup=warmup)
        check_positive(weight=weight)
        self.weight = weight
        self.relu = not self.preactivation if relu is None else relu

    def make(self, student: Sequence[FeatureInfo], teacher: Sequence[FeatureInfo], classes: Any, pooled: Any) -> None:
        self.weights = [info.weight for info in student]
        self.regressors = nn.ModuleList(Regressor(s, t, self.relu) for s, t in zip(student, teacher, strict=True))

    def forward(self, student: Outputs, teacher: Outputs, targets: Any, *, generator: Any) -> dict[str, Tensor]:
        losses = self.cross_entropy(student, targets)
        features = zip(self.regressors, student.features, teacher.features, self.weights, strict=True)
        for i, (regressor, s, t, weight) in enumerate(features):
            losses[f"fitnet_{i}"] = self.warm * self.weight * weight * F.mse_loss(regressor(s).float(), t.float())
        return losses
