"""DPK on the necks of detectors: torchvision's feature pyramids as lists of levels.

A detector's images differ in size and its losses are its own, so the distiller's loop is not used: `NeckDistiller`
taps the two pyramids, and its losses are added to the detector's.
"""

from collections.abc import Sequence
from typing import Any

import torch
from papercore.errors import InputError
from torch import Tensor, nn

from dpk.dpk_method import DPK
from dpk.method import FeatureInfo, Method, Outputs


class NeckDistiller(nn.Module):
    """total = student(images, targets) losses + distillation losses of the pyramid's levels.

    Args:
        student, teacher: torchvision detectors whose `backbone` gives a mapping of levels (feature pyramids); the
            teacher is frozen.
        method: what compares the levels; None: DPK with convolutional integrators, CKA over pixels (batches of
            detectors are too small for CKA over images), no cross-entropy.
        levels: keys of the pyramid; None: all that both have.
        size: height and width of the example that the levels are measured with, in pixels.
        seed: of the method's first weights and of the masks.

    Raises:
        InputError: a network without such a backbone, or levels that only one has.
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
        self.student = student
        self._teacher = (teacher.requires_grad_(False).eval(),)
        self.method = method or DPK(integrator="conv", samples="tokens", ce_weight=0.0)
        found = [pyramid(network, torch.zeros(1, 3, *size)) for network in (student, teacher)]
        shared = [key for key in found[0] if key in found[1]]
        self.levels = list(shared if levels is None else levels)
        for key in self.levels:
            if key not in shared:
                raise InputError(f"level {key}", found="not in both pyramids", expected=" or ".join(shared))
        if not self.levels:
            raise InputError("levels", found="none in both pyramids", expected="at least one")
        infos = [[FeatureInfo(key, *maps[key].shape[1:]) for key in self.levels] for maps in found]
        self.method.build(infos[0], infos[1], seed=seed)
        self.generator = torch.Generator().manual_seed(seed)

    @property
    def teacher(self) -> nn.Module:
        return self._teacher[0]

    def forward(self, images: Sequence[Tensor], targets: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """All losses by name: the detector's own, and the levels' under "dpk."."""
        kept: list[dict[str, Tensor]] = []
        backbone: Any = self.student.backbone
        handle = backbone.register_forward_hook(lambda module, inputs, output: kept.append(dict(output)))
        try:
            losses = self.student(list(images), list(targets))
        finally:
            handle.remove()
        transform: Any = self.student.transform
        with torch.no_grad():
            if self.teacher.training:
                self.teacher.eval()
            batch = transform(list(images))[0].tensors
            taught = self.teacher.to(batch.device).backbone(batch)  # pyright: ignore[reportCallIssue]
        student = Outputs(torch.empty(0), [kept[0][key] for key in self.levels])
        teacher = Outputs(torch.empty(0), [taught[key] for key in self.levels])
        targets_of_none = torch.empty(0, dtype=torch.long)
        extra = self.method(student, teacher, targets_of_none, generator=self.generator)
        return {**losses, **{f"dpk.{name}": loss for name, loss in extra.items()}}


@torch.no_grad()
def pyramid(network: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """The levels that a detector's backbone gives.

    Raises:
        InputError: no backbone, or one that gives no mapping of maps.
    """
    backbone = getattr(network, "backbone", None)
    if not isinstance(backbone, nn.Module):
        raise InputError("detector", found=type(network).__name__, expected="one of torchvision with a backbone")
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
