"""DPK on the necks of detectors: torchvision's feature pyramids as lists of levels.

A detector's images differ in size and its losses are its own, so the distiller's loop is not used: `NeckDistiller`
taps the two pyramids, and its losses are added to the detector's.

    distiller = NeckDistiller(student, teacher)
    losses = distiller(images, targets)                     # the detector's own, and "dpk.feature.LEVEL"
    sum(losses.values()).backward()
    distiller.method.info()                                 # rho and CKA by level; whether pixels were CKA's samples
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from papercore.errors import InputError
from torch import Tensor, nn

from dpk.dpk_method import DPK
from dpk.method import FeatureInfo, Method, Outputs
from dpk.taps import unwrap


class NeckDistiller(nn.Module):
    """losses = distiller(images, targets): the student detector's, and those of the pyramid's levels.

    The teacher's own losses and boxes are not computed: its backbone is given what the student's is given, after the
    student's resizing and normalisation. It is put into evaluation mode, frozen, and moves with this module without
    being a part of it.

    Args:
        student, teacher: torchvision detectors whose `backbone` gives a mapping of levels (feature pyramids); the
            student wrapped by DistributedDataParallel or not.
        method: what compares the levels, without a loss on logits and with `ce_weight` 0; none: DPK with convolutional
            integrators; CKA over the last 32 images where a step has four or more, over pixels otherwise.
        levels: keys of the pyramid; none: all that both have.
        size: height and width of the example that the levels are measured with, in pixels.
        seed: of the method's first weights and of the masks.

    Raises:
        InputError: a network without such a backbone, levels that only one has, or a method that needs logits.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        method: Method | None = None,
        *,
        levels: Sequence[str] | None = None,
        size: tuple[int, int] = (128, 128),
        seed: int = 0,
    ) -> None:
        super().__init__()
        if unwrap(teacher) is unwrap(student):
            raise InputError("teacher", found="the student itself", expected="another network")
        self.student, self.seed = student, seed
        self._teacher = (unwrap(teacher).requires_grad_(False).eval(),)  # a tuple: not a part of this module
        self._generator: torch.Generator | None = None
        self.method = method or DPK(integrator="conv", samples="auto", ce_weight=0.0)
        if self.method.ce_weight or self.method.needs_logits or not self.method.needs_features:
            raise InputError(
                f"{type(self.method).__name__} on a detector",
                found="a loss on logits",
                expected="a method of features with ce_weight=0: the detector's own losses are added",
            )
        found = [pyramid(network, torch.zeros(1, 3, *size)) for network in (student, teacher)]
        shared = [key for key in found[0] if key in found[1]]
        self.levels = list(shared if levels is None else levels)
        """keys of the pyramid, in the order of the method's stages"""
        for key in self.levels:
            if key not in shared:
                raise InputError(f"level {key}", found="not in both pyramids", expected=" or ".join(shared))
        if not self.levels:
            raise InputError("levels", found="none in both pyramids", expected="at least one")
        infos = [[FeatureInfo(key, *maps[key].shape[1:]) for key in self.levels] for maps in found]
        self.method.build(infos[0], infos[1], seed=seed)
        self.method.to(next(student.parameters()).device)

    @property
    def teacher(self) -> nn.Module:
        """The frozen detector."""
        return self._teacher[0]

    def forward(
        self,
        images: Sequence[Tensor],
        targets: Sequence[dict[str, Tensor]],
        *,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """All losses by name: the detector's own, and the levels' under "dpk.".

        Args:
            images: [3, h, w] each, as torchvision's detectors take them.
            generator: for the masks, on the images' device; none: this module's own.

        Raises:
            InputError: the student is in evaluation mode and has no losses, or the network has changed.
        """
        if not self.student.training:
            raise InputError("student", found="in evaluation mode", expected="in training mode: it gives its losses")
        seen: list[tuple[Tensor, Mapping[str, Tensor]]] = []
        backbone = backbone_of(unwrap(self.student))
        handle = backbone.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
        try:
            losses = self.student(list(images), list(targets))
        finally:
            handle.remove()
        batch, levels = seen[0]
        with torch.no_grad():
            if self.teacher.training:  # a training loop may have switched it
                self.teacher.eval()
            taught = backbone_of(self.teacher)(batch)
        none = batch.new_empty(0)
        extra = self.method(
            Outputs(none, [levels[key] for key in self.levels]),
            Outputs(none, [taught[key] for key in self.levels]),
            none.long(),
            generator=generator or self.generator(batch.device),
        )
        return {**losses, **{f"dpk.{name}": loss for name, loss in extra.items()}}

    def generator(self, device: torch.device) -> torch.Generator:
        """The masks' generator where the loop gives none."""
        if self._generator is None or self._generator.device.type != device.type:
            self._generator = torch.Generator(device).manual_seed(self.seed)
        return self._generator

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The student's and the method's: one optimiser, one clipping and one weight decay for both."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def student_state_dict(self) -> dict[str, Tensor]:
        """With the keys of the plain detector."""
        return unwrap(self.student).state_dict()

    def epoch(self, number: int) -> None:
        """Epoch `number`, counted from 0, begins: moves warm-ups, and raises for features that were not finite."""
        self.method.check()
        self.method.epoch(number)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "NeckDistiller":
        for teacher in self._teacher:  # follows to a device or type without being a part
            teacher._apply(fn, recurse)
        return super()._apply(fn, recurse)


def backbone_of(network: nn.Module) -> nn.Module:
    """The part of a detector that gives its pyramid.

    Raises:
        InputError: none.
    """
    backbone = getattr(network, "backbone", None)
    if not isinstance(backbone, nn.Module):
        raise InputError("detector", found=type(network).__name__, expected="one of torchvision with a backbone")
    return backbone


@torch.no_grad()
def pyramid(network: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """The levels that a detector's backbone gives, in evaluation mode; its mode is restored.

    Raises:
        InputError: no backbone, or one that gives no mapping of maps.
    """
    backbone = backbone_of(unwrap(network))
    modes = [(module, module.training) for module in backbone.modules()]
    backbone.eval()
    try:
        maps = backbone(images.to(next(backbone.parameters()).device))
    finally:
        for module, mode in modes:
            module.training = mode
    if not isinstance(maps, dict) or not all(isinstance(m, Tensor) and m.ndim == 4 for m in maps.values()):
        raise InputError("backbone", found=type(maps).__name__, expected="a mapping of levels to maps")
    return maps
