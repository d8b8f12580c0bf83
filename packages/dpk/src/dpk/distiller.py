"""A student, a frozen teacher and a method as one module for any training loop."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from papercore.errors import InputError
from torch import Tensor, nn

from dpk.method import Method, Outputs, Pair
from dpk.taps import Taps, auto_pairs, single, unwrap


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
    """out = distiller(images, targets); out.total.backward(). Only the student and the method's parts train.

    The teacher is put into evaluation mode and its parameters no longer want gradients; it moves with this module but
    is not part of it: `state_dict` and `parameters` hold the student ("student.") and the method ("method.") alone.

    Args:
        student: wrapped by DistributedDataParallel or not.
        teacher: may be None for a method that needs none.
        method: built here, once; see `Method`.
        example_input: images as the networks take them; sizes and stages are read from one pass of each.
        seed: of the method's first weights, and of the masks in a loop that gives no generator.
        select: picks the logits from what a network returns that is not a tensor.

    Raises:
        InputError: taps not found, networks that the method cannot compare, one network as both.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        method: Method,
        example_input: Tensor,
        *,
        seed: int = 0,
        select: Callable[[Any], Tensor] | None = None,
    ) -> None:
        super().__init__()
        if teacher is None and method.needs_teacher:
            raise InputError(f"{type(method).__name__} needs a teacher", found="none")
        if teacher is not None and unwrap(teacher) is unwrap(student):
            raise InputError("teacher", found="the student itself", expected="another network")
        self.student, self.method, self.select, self.seed = single(student, "student"), method, select, seed
        self._teacher = () if teacher is None else (single(teacher, "teacher"),)  # a tuple: not a part of this module
        self._generator: torch.Generator | None = None
        self.pairs: list[Pair] = []
        """the taps that are compared, from shallow to deep"""
        if method.needs_features:
            assert teacher is not None
            given = method.pairs
            found = auto_pairs(student, teacher, example_input, method.stages) if isinstance(given, str) else given
            self.pairs = list(found)
        self.taps = [
            Taps(
                network,
                [getattr(pair, role) for pair in self.pairs],
                example_input,
                preactivation=(
                    method.preactivation
                    if role == "teacher" or method.student_preactivation is None
                    else method.student_preactivation
                ),
                grids=[getattr(pair, f"{role}_grid") for pair in self.pairs],
                role=role,
            )
            for role, network in zip(("student", "teacher"), (self.student, *self._teacher), strict=False)
        ]
        infos = [
            [
                dataclasses.replace(info, patch=pair.patch, weight=pair.weight)
                for info, pair in zip(taps.infos, self.pairs, strict=True)
            ]
            for taps in self.taps
        ]
        classes = [taps.classes for taps in self.taps]
        widths = [taps.pooled for taps in self.taps]
        method.build(
            infos[0],
            infos[-1],
            (classes[0], classes[-1]),
            pooled=None if None in widths else (widths[0], widths[-1]),  # pyright: ignore[reportArgumentType]
            seed=seed,
        )
        parameter = next(self.student.parameters(), None)
        if parameter is not None:
            method.to(parameter.device)
        if teacher is not None:
            teacher.requires_grad_(False).eval()

    @property
    def teacher(self) -> nn.Module | None:
        """The frozen network."""
        return self._teacher[0] if self._teacher else None

    def forward(
        self,
        images: Tensor,
        targets: Int[Tensor, " batch"],
        *,
        generator: torch.Generator | None = None,
        taught: Outputs | None = None,
    ) -> Distilled:
        """One step's losses. Does not wait for the device.

        Args:
            generator: for the masks, on the images' device; none: this module's own, see `generator`.
            taught: what `teach` gave for these images earlier; without augmentation the teacher need run only once.
        """
        student = self.run(0, images)
        if not self.method.needs_teacher:
            teacher = Outputs(student.logits.detach(), [])
        else:
            teacher = self.teach(images) if taught is None else taught
        losses = self.method(student, teacher, targets, generator=generator or self.generator(images.device))
        if not losses:
            raise InputError("the method gives no loss", expected="a weight above 0")
        total = torch.stack([loss.float() for loss in losses.values()]).sum()
        return Distilled(student.logits, losses, total, self.method.info())

    @torch.no_grad()
    def teach(self, images: Tensor) -> Outputs:
        """What the teacher gives, in evaluation mode and without gradient."""
        teacher = self.teacher
        assert teacher is not None
        if teacher.training:  # a training loop may have switched it
            teacher.eval()
        return self.run(1, images)

    def run(self, which: int, images: Tensor) -> Outputs:
        """One network's outputs: 0 the student, 1 the teacher."""
        taps = self.taps[which]
        with taps.capture() as (maps, pooled):
            result = taps.network(images)
        logits = self.select(result) if self.select else result
        if not isinstance(logits, Tensor):
            raise InputError(
                f"output of the {taps.role}", found=type(logits).__name__, expected="logits", hint="give select"
            )
        return Outputs(logits, maps, pooled[-1] if pooled else None)

    def generator(self, device: torch.device | str = "cpu") -> torch.Generator:
        """The masks' generator where the loop gives none; `dpk.checkpoint` keeps its state."""
        device = torch.device(device)
        if self._generator is None or self._generator.device.type != device.type:
            self._generator = torch.Generator(device).manual_seed(self.seed)
        return self._generator

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The student's and the method's: one optimiser, one clipping and one weight decay for both."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def student_state_dict(self) -> dict[str, Tensor]:
        """With the keys of the plain student."""
        return unwrap(self.student).state_dict()

    def epoch(self, number: int) -> None:
        """Epoch `number`, counted from 0, begins: moves warm-ups and schedules, and raises for features that were not
        finite in the last one."""
        self.method.check()
        self.method.epoch(number)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Distiller":
        for teacher in self._teacher:  # follows to a device or type without being a part
            teacher._apply(fn, recurse)
        return super()._apply(fn, recurse)
