"""Distillation of logits: KD (Hinton et al., arXiv 1503.02531) and DKD (Zhao et al., arXiv 2203.08679)."""

from typing import Any

import torch
from jaxtyping import Float, Int
from papercore.errors import InputError
from torch import Tensor

from dpk.method import Method, Outputs


def kd_loss(
    student: Float[Tensor, "batch classes"], teacher: Float[Tensor, "batch classes"], temperature: float = 4.0
) -> Float[Tensor, ""]:
    """T^2 times the mean over the batch of KL(teacher || student), softmax at temperature T."""
    return temperature**2 * _divergence(student / temperature, teacher / temperature)


def dkd_parts(
    student: Float[Tensor, "batch classes"],
    teacher: Float[Tensor, "batch classes"],
    targets: Int[Tensor, " batch"],
    temperature: float = 4.0,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """(TCKD, NCKD), each times T^2, means over the batch.

    TCKD is the divergence of (p_target, 1 - p_target), NCKD that of the softmax over all classes but the target (0 when
    there is only one). Everything is computed from logits by log-sum-exp: no probability underflows, and the target's
    class is taken out, not pushed down.
    """
    binary = []
    others = []
    for logits in (student, teacher):
        logits = logits / temperature
        rest = without_target(logits, targets)
        total = logits.logsumexp(-1)
        target = logits.gather(1, targets[:, None])[:, 0]
        binary.append(torch.stack([target - total, rest.logsumexp(-1) - total], 1))
        others.append(rest)
    scale = temperature**2
    return scale * _divergence(*binary), scale * _divergence(*others)


def dkd_loss(
    student: Float[Tensor, "batch classes"],
    teacher: Float[Tensor, "batch classes"],
    targets: Int[Tensor, " batch"],
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
) -> Float[Tensor, ""]:
    """alpha TCKD + beta NCKD."""
    target, others = dkd_parts(student, teacher, targets, temperature)
    return alpha * target + beta * others


def without_target(
    logits: Float[Tensor, "batch classes"], targets: Int[Tensor, " batch"]
) -> Float[Tensor, "batch classes-1"]:
    """The logits of all classes but each sample's own."""
    index = torch.arange(logits.shape[1] - 1, device=logits.device).expand(len(logits), -1)
    return logits.gather(1, index + (index >= targets[:, None]))


def _divergence(student: Tensor, teacher: Tensor) -> Float[Tensor, ""]:
    """Mean over rows of KL(softmax teacher || softmax student); 0 for rows without an entry."""
    p, q = teacher.log_softmax(-1), student.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean()


def check_positive(**values: float) -> None:
    """Raises InputError for a temperature that is not above 0 or a weight below 0."""
    for name, value in values.items():
        least = "above 0" if name == "temperature" else "at least 0"
        if not (0 < value < float("inf") or (value == 0 and name != "temperature")):
            raise InputError(name, found=value, expected=f"a number {least}")


class KD(Method):
    """Softened probabilities of the teacher as targets.

    Args:
        temperature: T.
        weight: of the divergence.
        ce_weight: of the cross-entropy.
    """

    needs_features = False
    needs_logits = True

    def __init__(
        self, *, temperature: float = 4.0, weight: float = 0.9, ce_weight: float = 0.1, warmup: int = 0
    ) -> None:
        super().__init__(ce_weight=ce_weight, warmup=warmup)
        check_positive(temperature=temperature, weight=weight)
        self.temperature, self.weight = temperature, weight

    def forward(self, student: Outputs, teacher: Outputs, targets: Any, *, generator: Any) -> dict[str, Tensor]:
        loss = kd_loss(student.logits.float(), teacher.logits.float(), self.temperature)
        return {**self.cross_entropy(student, targets), "kd": self.warm * self.weight * loss}


class DKD(Method):
    """The target's probability and the distribution over the other classes, each with its own weight.

    Args:
        alpha, beta: of TCKD and NCKD.
        warmup: epochs of linear growth; its authors take 20.
    """

    needs_features = False
    needs_logits = True

    def __init__(
        self,
        *,
        alpha: float = 1.0,
        beta: float = 8.0,
        temperature: float = 4.0,
        ce_weight: float = 1.0,
        warmup: int = 20,
    ) -> None:
        super().__init__(ce_weight=ce_weight, warmup=warmup)
        check_positive(temperature=temperature, alpha=alpha, beta=beta)
        self.alpha, self.beta, self.temperature = alpha, beta, temperature

    def forward(self, student: Outputs, teacher: Outputs, targets: Any, *, generator: Any) -> dict[str, Tensor]:
        arguments = (student.logits.float(), teacher.logits.float(), targets)
        target, others = dkd_parts(*arguments, temperature=self.temperature)
        losses = {"tckd": self.warm * self.alpha * target, "nckd": self.warm * self.beta * others}
        return {**self.cross_entropy(student, targets), **losses}
