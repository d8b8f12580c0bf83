"""Knowledge review (Chen et al., arXiv 2104.09044): the student's levels are fused from deep to shallow."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dpk.method import FeatureInfo, Method, Outputs, PairLike
from dpk.methods.logits import check_positive


def hcl_loss(
    student: Sequence[Float[Tensor, "batch channels h w"]], teacher: Sequence[Float[Tensor, "batch channels h w"]]
) -> Float[Tensor, ""]:
    """Hierarchical context loss, summed over levels, see `hcl_level`."""
    return sum((hcl_level(s, t) for s, t in zip(student, teacher, strict=True)), student[0].new_zeros(()))


def hcl_level(
    student: Float[Tensor, "batch channels h w"], teacher: Float[Tensor, "batch channels h w"]
) -> Float[Tensor, ""]:
    """Mean squared error at full size and after averaging to 4, 2 and 1 (sizes below the height), with weights
    1, 1/2, 1/4, 1/8, over the sum of those used."""
    loss, total, weight = F.mse_loss(student, teacher), 1.0, 1.0
    for size in (4, 2, 1):
        if size >= student.shape[2]:
            continue
        weight /= 2
        loss = loss + weight * F.mse_loss(F.adaptive_avg_pool2d(student, size), F.adaptive_avg_pool2d(teacher, size))
        total += weight
    return loss / total


class Fusion(nn.Module):
    """Attention-based fusion of a level with what comes from the deeper ones.

    Args:
        fuse: whether there is a deeper one.
    """

    def __init__(self, channels: int, middle: int, out: int, fuse: bool) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(channels, middle, 1, bias=False), nn.BatchNorm2d(middle))
        self.conv2 = nn.Sequential(nn.Conv2d(middle, out, 3, padding=1, bias=False), nn.BatchNorm2d(out))
        self.att_conv = nn.Sequential(nn.Conv2d(2 * middle, 2, 1), nn.Sigmoid()) if fuse else None
        for layer in (self.conv1[0], self.conv2[0]):
            assert isinstance(layer, nn.Conv2d)
            nn.init.kaiming_uniform_(layer.weight, a=1)

    def forward(self, x: Tensor, deeper: Tensor | None, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """(the level in the teacher's channels and size, what the next shallower level is fused with)."""
        x = self.conv1(x)
        if self.att_conv is not None and deeper is not None:
            deeper = F.interpolate(deeper, size=x.shape[2:], mode="nearest")
            attention = self.att_conv(torch.cat([x, deeper], 1))
            x = x * attention[:, :1] + deeper * attention[:, 1:]
        out = self.conv2(x)
        if tuple(out.shape[2:]) != size:
            out = F.interpolate(out, size=size, mode="nearest")
        return out, x


class ReviewKD(Method):
    """Every level of the teacher is compared with a fusion of the student's levels down to it.

    Args:
        weight: of the hierarchical context losses.
        middle: channels that levels are fused in; none: those of the student's deepest level, at most 512.
        warmup: epochs of linear growth; its authors take 20.
        pooled: take the pooled vectors as the deepest level, where both networks have one.
        student_preactivation: of the student's taps; none: as `preactivation` says of both. The CIFAR-100 protocol has
            the teacher's before and the student's after the activation.
    """

    def __init__(
        self,
        *,
        weight: float = 5.0,
        middle: int | None = None,
        pooled: bool = True,
        pairs: Literal["auto"] | Sequence[PairLike] = "auto",
        stages: int | Literal["all"] = "all",
        preactivation: bool = True,
        student_preactivation: bool | None = None,
        ce_weight: float = 1.0,
        warmup: int = 20,
    ) -> None:
        super().__init__(pairs=pairs, stages=stages, preactivation=preactivation, ce_weight=ce_weight, warmup=warmup)
        check_positive(weight=weight)
        self.weight, self.middle, self.with_pooled = weight, middle, pooled
        self.student_preactivation = student_preactivation
        self.has_pooled = False

    def make(
        self,
        student: Sequence[FeatureInfo],
        teacher: Sequence[FeatureInfo],
        classes: tuple[int, int],
        pooled: tuple[int, int] | None,
    ) -> None:
        self.has_pooled = self.with_pooled and pooled is not None
        channels = [(s.channels, t.channels) for s, t in zip(student, teacher, strict=True)]
        if self.has_pooled and pooled is not None:
            channels.append(pooled)
        middle = self.middle or min(512, channels[-1][0])
        self.weights = [info.weight for info in student] + [1.0] * self.has_pooled
        self.fusions = nn.ModuleList(
            Fusion(before, middle, after, fuse=i > 0) for i, (before, after) in enumerate(reversed(channels))
        )
        """from the deepest level to the shallowest"""

    def forward(self, student: Outputs, teacher: Outputs, targets: Any, *, generator: Any) -> dict[str, Tensor]:
        levels = [list(outputs.features) for outputs in (student, teacher)]
        if self.has_pooled:
            for outputs, features in zip((student, teacher), levels, strict=True):
                assert outputs.pooled is not None
                features.append(outputs.pooled[:, :, None, None])
        fused = self.fuse(*levels)
        losses = self.cross_entropy(student, targets)
        for i, (x, target, weight) in enumerate(zip(fused, levels[1], self.weights, strict=True)):
            losses[f"review_{i}"] = self.warm * self.weight * weight * hcl_level(x.float(), target.float())
        return losses

    def fuse(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> list[Tensor]:
        """The student's levels in the teacher's shapes; both from shallow to deep."""
        results, deeper = [], None
        for fusion, x, target in zip(self.fusions, reversed(student), reversed(teacher), strict=True):
            out, deeper = fusion(x, deeper, tuple(target.shape[2:]))
            results.insert(0, out)
        return results
