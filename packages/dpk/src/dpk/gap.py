"""The feature gap of every stage at every step: CKA on the device, pooled, smoothed, kept through a resume."""

import warnings
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from papercore.errors import WorkError
from torch import Tensor, nn

from dpk.alignment import LEAST, gram, grams, ratio_of_sums, stacked_hsics, token_samples
from dpk.integrator import fit
from dpk.prior import smooth

Samples = Literal["images", "tokens", "auto"]
RECENT = 32
"""images over which "auto" adds up HSICs"""


class FeatureGap(nn.Module):
    """CKA of S stages, one call a step.

    Args:
        stages: names of the stages, for messages.
        samples: "images": every image is one sample (undefined with 3 or fewer); "tokens": every pixel is one, maps
            averaged to at most 16 x 16 and at most 256 pixels taken; "auto": images with the HSICs of the last 32 added
            up if there are more than 3, tokens otherwise (detectors).
        momentum: of the smoothed CKA, which starts at 0.5; 0: none.
    """

    smoothed: Tensor
    recent: Tensor
    steps: Tensor
    broken: Tensor

    def __init__(self, stages: Sequence[str], samples: Samples = "images", momentum: float = 0.0) -> None:
        super().__init__()
        self.stages, self.samples, self.momentum = list(stages), samples, momentum
        count = len(stages)
        self.register_buffer("smoothed", torch.full((count,), 0.5, dtype=torch.float64))
        self.register_buffer("recent", torch.zeros(count, RECENT // LEAST, 3, dtype=torch.float64))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("broken", torch.full((count, 2), -1, dtype=torch.int64))

    @torch.no_grad()
    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Float[Tensor, " s"]:
        """CKA by stage: smoothed if that is asked for, 0 where it is undefined. Does not wait for the device.

        With several processes the HSICs are averaged over them, so that all get the same values.
        """
        images = len(student[0])
        by_tokens = self.tokenwise(images)
        if self.samples == "images" and images < LEAST:
            warnings.warn(
                f"CKA needs {LEAST} images, the batch has {images}: the smoothed CKA is used, or the largest ratio",
                stacklevel=2,
            )
        if by_tokens:
            # one grid a stage and so one size of Gram matrix a stage
            sampled = [token_samples(*pair) for pair in zip(student, teacher, strict=True)]
            sums = torch.cat([stacked_hsics(torch.stack([gram(x), gram(y)])[None]) for x, y in sampled])
        else:
            pairs = zip(student, teacher, strict=True)
            sums = stacked_hsics(torch.stack([torch.stack([gram(x), gram(y)]) for x, y in pairs]))
        distributed = torch.distributed
        if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            distributed.all_reduce(sums)  # the number of processes cancels in CKA
        self._watch(sums)
        if self.samples == "auto" and not by_tokens:
            self.recent.copy_(torch.cat([sums[:, None], self.recent[:, :-1]], 1))
            sums = self.recent[:, : max(1, RECENT // images)].sum(1)
        cka = ratio_of_sums(sums)
        if not self.momentum:
            return cka
        defined = (sums[:, 1] > 0) & (sums[:, 2] > 0)
        self.smoothed.copy_(torch.where(defined, smooth(self.smoothed, cka, self.momentum), self.smoothed))
        return self.smoothed.clone()

    def tokenwise(self, images: int) -> bool:
        """Whether pixels, not images, are the samples for a batch of so many."""
        return self.samples == "tokens" or (self.samples == "auto" and images < LEAST)

    @torch.no_grad()
    def by_image(self, student: Tensor, teacher: Tensor) -> Float[Tensor, " b"]:
        """CKA of every single image, its pixels being the samples, on one grid of at most 8 x 8."""
        height, width = (min(8, side) for side in teacher.shape[-2:])
        flat = [fit(x.float(), (height, width)).flatten(2).mT for x in (student, teacher)]
        return ratio_of_sums(stacked_hsics(torch.stack([grams(x) for x in flat], 1)))

    def _watch(self, sums: Float[Tensor, "s 3"]) -> None:
        """Notes the first step whose features were not finite; a Gram matrix of such has no finite HSIC."""
        bad = ~torch.isfinite(sums[:, 1:])
        self.broken.copy_(torch.where((self.broken < 0) & bad, self.steps, self.broken))
        self.steps += 1

    def check(self) -> None:
        """Raises WorkError if features were not finite at a step so far, and names it; waits for the device."""
        for name, steps in zip(self.stages, self.broken.tolist(), strict=True):
            for network, step in zip(("student", "teacher"), steps, strict=True):
                if step >= 0:
                    raise WorkError(f"features of the {network} at stage {name} are not finite at step {step}")
