"""A student, a frozen teacher and a method as one module for any training loop."""

import dataclasses

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dpk.method import Method


@dataclasses.dataclass
class Distilled:
    """What a step gives."""

    logits: Float[Tensor, "batch classes"]
    """of the student"""
    losses: dict[str, Float[Tensor, ""]]
    """by name, weighted"""
    total: Float[Tensor, ""]
    """their sum, to call backward on"""
    info: dict[str, Tensor]
    """detached, for the log: "rho" and "cka" by stage where the method has them"""


class Distiller(nn.Module):
    """out = distiller(images, targets); out.total.backward(). Only the student and the method's parts train."""

    def __init__(
        self, student: nn.Module, teacher: nn.Module | None, method: Method, example_input: Tensor, *, seed: int = 0
    ) -> None:
        super().__init__()
        raise NotImplementedError

    def forward(
        self, images: Tensor, targets: Int[Tensor, " batch"], *, generator: torch.Generator | None = None
    ) -> Distilled:
        raise NotImplementedError

    def trainable_parameters(self) -> list[nn.Parameter]:
        raise NotImplementedError

    def student_state_dict(self) -> dict[str, Tensor]:
        raise NotImplementedError

    def epoch(self, number: int) -> None:
        raise NotImplementedError
