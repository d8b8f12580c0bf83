"""What every distillation method is: named losses from two networks' outputs, with trainable parts of its own."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from papercore.errors import InputError
from torch import Tensor, nn
from torch.nn import functional


@dataclasses.dataclass(frozen=True)
class Pair:
    """A tap in the student and the one in the teacher that it is compared with."""

    student: str
    """name of a module, as in `named_modules`"""
    teacher: str
    patch: int | None = None
    """side of a patch in teacher pixels, for the methods that cut patches; none: chosen by size"""
    weight: float = 1.0
    """of this stage's loss, on top of the method's"""
    student_grid: tuple[int, int] | None = None
    """height and width of tokens that do not form a square"""
    teacher_grid: tuple[int, int] | None = None

    @classmethod
    def of(cls, given: "PairLike") -> "Pair":
        """From a pair, one name for both networks, two names, or a mapping of the fields above."""
        if isinstance(given, Pair):
            return given
        if isinstance(given, str):
            return cls(given, given)
        try:
            return cls(**given) if isinstance(given, Mapping) else cls(given[0], given[1], *given[2:])
        except (TypeError, IndexError) as error:
            fields = ", ".join(field.name for field in dataclasses.fields(cls))
            raise InputError("pair", found=given, expected=f"a name, two names, or {fields}") from error


PairLike = Pair | str | Sequence[Any] | Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class FeatureInfo:
    """One tap of one network, as measured with the example input."""

    name: str
    channels: int
    height: int
    width: int
    patch: int | None = None
    """what the pair asks for"""
    weight: float = 1.0


@dataclasses.dataclass
class Outputs:
    """What one network gave for a batch."""

    logits: Tensor
    """[B, classes]; empty where there are none (detectors)"""
    features: list[Tensor]
    """a map [B, C, H, W] for every pair, tokens unfolded"""
    pooled: Tensor | None = None
    """[B, width]: what the last linear layer was given, if it gave the logits"""


class Method(nn.Module):
    """Base of all methods. A subclass makes its parts in `make` and its losses in `forward`.

    Whatever must survive a resume beside the trainable parts is a buffer. `forward` must not wait for the device.

    Args:
        pairs: "auto" (stages of equal stride), or a list of `Pair` or what `Pair.of` takes.
        stages: at most how many automatic pairs, the deepest; "all" for every one.
        preactivation: take the input of the activation that ends a stage, where there is one.
        ce_weight: weight of the cross-entropy; 0 leaves it out.
        warmup: epochs over which the weight of the distillation losses grows linearly; see `epoch`.
    """

    needs_teacher: bool = True
    needs_features: bool = True
    student_preactivation: bool | None = None
    """of the student's taps; none: as `preactivation` says of both"""
    needs_logits: bool = False
    """compares the logits of both networks, which must be for the same classes"""

    def __init__(
        self,
        *,
        pairs: Literal["auto"] | Sequence[PairLike] = "auto",
        stages: int | Literal["all"] = 2,
        preactivation: bool = True,
        ce_weight: float = 1.0,
        warmup: int = 0,
    ) -> None:
        super().__init__()
        if pairs != "auto" and (isinstance(pairs, str) or not len(pairs)):
            raise InputError("pairs", found=pairs, expected='"auto" or a list of at least one pair')
        if stages != "all" and (not isinstance(stages, int) or stages < 1):
            raise InputError("stages", found=stages, expected='at least 1, or "all"')
        for name, value in (("ce_weight", ce_weight), ("warmup", warmup)):
            if not 0 <= value < float("inf"):
                raise InputError(name, found=value, expected="a number of at least 0")
        self.pairs = "auto" if pairs == "auto" else [Pair.of(pair) for pair in pairs]
        self.stages: int | Literal["all"] = stages
        self.preactivation = preactivation
        self.ce_weight, self.warmup = ce_weight, warmup
        self.warm = 1.0
        """factor of the warm-up; 1 until `epoch` is called"""
        self.built = False

    def build(
        self,
        student: Sequence[FeatureInfo],
        teacher: Sequence[FeatureInfo],
        classes: tuple[int, int] = (0, 0),
        *,
        pooled: tuple[int, int] | None = None,
        seed: int = 0,
    ) -> None:
        """Makes the trainable parts for these taps, with weights that depend on `seed` alone. Once.

        Args:
            student, teacher: the taps, pair by pair, from shallow to deep.
            classes: of the student and of the teacher.
            pooled: widths of the pooled vectors of both, where both have one.

        Raises:
            InputError: the two networks cannot be compared by this method, or it is built already.
        """
        if self.built:
            raise InputError(f"{type(self).__name__} is in use", hint="make one method for every distiller")
        if self.needs_features and not (len(student) and len(student) == len(teacher)):
            raise InputError("pairs", found=f"{len(student)} and {len(teacher)} taps", expected="at least one pair")
        if self.needs_logits and classes[0] != classes[1]:
            raise InputError(
                f"{type(self).__name__} compares logits",
                found=f"{classes[0]} classes of the student, {classes[1]} of the teacher",
                expected="equal numbers",
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.make(student, teacher, classes, pooled)
        self.built = True

    def make(
        self,
        student: Sequence[FeatureInfo],
        teacher: Sequence[FeatureInfo],
        classes: tuple[int, int],
        pooled: tuple[int, int] | None,
    ) -> None:
        """Adds the trainable parts as submodules, drawing from torch's global generator. Default: none."""

    def forward(
        self, student: Outputs, teacher: Outputs, targets: Int[Tensor, " batch"], *, generator: torch.Generator | None
    ) -> dict[str, Float[Tensor, ""]]:
        """Named, weighted losses; their sum is the total. The cross-entropy is "ce" (`cross_entropy`).

        Args:
            generator: for everything random, on the device of the features.
        """
        raise NotImplementedError

    def cross_entropy(self, student: Outputs, targets: Int[Tensor, " batch"]) -> dict[str, Float[Tensor, ""]]:
        """{"ce": weighted cross-entropy}, or {} at weight 0."""
        if not self.ce_weight:
            return {}
        return {"ce": self.ce_weight * functional.cross_entropy(student.logits.float(), targets)}

    def epoch(self, number: int) -> None:
        """Epoch `number`, counted from 0, begins: the warm-up's factor is min(1, (number + 1) / warmup).

        Never called, there is no warm-up.
        """
        self.warm = min(1.0, (number + 1) / self.warmup) if self.warmup else 1.0

    def info(self) -> dict[str, Tensor]:
        """Detached tensors of the last step to log, for example rho and cka by stage."""
        return {}

    def check(self) -> None:
        """Raises for what went wrong on the device since the last call; waits for it."""


class CrossEntropy(Method):
    """No distillation: the student alone, in the same harness."""

    needs_teacher = needs_features = False

    def forward(
        self, student: Outputs, teacher: Outputs, targets: Int[Tensor, " batch"], *, generator: torch.Generator | None
    ) -> dict[str, Float[Tensor, ""]]:
        return self.cross_entropy(student, targets)
