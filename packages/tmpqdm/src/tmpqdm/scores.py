"""How good a candidate's pictures are: the Frechet distance to real ones, or the paired difference to a long run.

A score is a function of a network and a list of timesteps; smaller is better. All candidates get the same noise and
the same conditions, and a fresh seed gives independent ones for the final word.
"""

import dataclasses
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from papercore.diffusion.frechet import frechet_distance, statistics
from papercore.errors import InputError
from papercore.images import read_arrays, read_images
from torch import Tensor, nn

from tmpqdm.features import FeatureFunction, extract, feature_function, function_name
from tmpqdm.sampling import Sampling, to_uint8


class Scored(NamedTuple):
    """A value and, when it is infinite, why."""

    value: float
    reason: str = ""


class Score(Protocol):
    """What a search needs of a score."""

    images: int
    """pictures of one value"""
    seed: int
    """of their noise"""

    def __call__(
        self,
        network: nn.Module,
        timesteps: Sequence[int],
        *,
        images: int | None = None,
        seed: int | None = None,
        before: Callable[[int], None] | None = None,
    ) -> Scored: ...

    def describe(self) -> dict[str, Any]:
        """What the value depends on beside network and timesteps, as JSON values."""
        ...


@dataclasses.dataclass(frozen=True)
class Reference:
    """Mean [d] and covariance [d, d] of the features of real pictures."""

    mu: NDArray[np.float64]
    sigma: NDArray[np.float64]
    count: int | None
    """pictures they come from, if known"""
    name: str

    @classmethod
    def of(cls, source: "Tensor | Path | str | Reference", function: FeatureFunction) -> "Reference":
        """From uint8 pictures [n, h, w, c], an .npz file (pictures under arr_0; or mu and sigma), or "digits".

        Raises:
            InputError: something else, or too few pictures.
        """
        if isinstance(source, Reference):
            return source
        if isinstance(source, Tensor):
            return cls(*statistics(extract(function, source)), len(source), "given pictures")
        if str(source) == "digits":
            from papercore.data.digits import digits

            images = to_uint8(digits("all").images)
            return cls(*statistics(extract(function, images)), len(images), "digits")
        path = Path(source)
        arrays = read_arrays(path, without="arr_0")
        if "mu" in arrays and "sigma" in arrays:
            mu, sigma = arrays["mu"].astype(np.float64), arrays["sigma"].astype(np.float64)
            if mu.ndim != 1 or sigma.shape != (mu.size, mu.size):
                raise InputError("mu and sigma", where=path, found=f"{mu.shape}, {sigma.shape}", expected="[d], [d, d]")
            return cls(mu, sigma, None, path.name)
        images = read_images(path)
        return cls(*statistics(extract(function, images)), len(images), path.name)


class FrechetScore:
    """See `frechet_score`."""

    metric = "frechet"

    def __init__(
        self, sampling: Sampling, function: FeatureFunction, reference: Reference, images: int, seed: int
    ) -> None:
        self.sampling, self.function, self.reference = sampling, function, reference
        self.images, self.seed = images, seed
        self._warned = False

    def __call__(
        self,
        network: nn.Module,
        timesteps: Sequence[int],
        *,
        images: int | None = None,
        seed: int | None = None,
        before: Callable[[int], None] | None = None,
    ) -> Scored:
        """The distance of the candidate's pictures; infinite, with the reason, when some are not finite.

        Args:
            network: in evaluation mode.
            timesteps: ascending.
            images, seed: others than the score's own.
            before: see `Sampling`.
        """
        images, seed = images or self.images, self.seed if seed is None else seed
        samples = self.sampling(network, timesteps, images, seed, before=before)
        bad = int((~torch.isfinite(samples.flatten(1)).all(1)).sum())
        if bad:
            return Scored(math.inf, f"{bad} of {images} images are not finite")
        return self.of_images(self.sampling.pictures(samples))

    def of_images(self, images: Tensor) -> Scored:
        """The distance of uint8 pictures [n, h, w, c]."""
        features = extract(self.function, images)
        if not np.isfinite(features).all():
            return Scored(math.inf, "features that are not finite")
        mu, sigma = statistics(features)
        if len(features) < 2 * features.shape[1] and not self._warned:
            self._warned = True
            rank = int(np.linalg.matrix_rank(sigma, hermitian=True))
            warnings.warn(
                f"{len(features)} images for {features.shape[1]} feature dimensions: the covariance has rank {rank}, "
                "and the Frechet distance is biased upward",
                stacklevel=2,
            )
        return Scored(frechet_distance(mu, sigma, self.reference.mu, self.reference.sigma))

    def describe(self) -> dict[str, Any]:
        return {
            "metric": self.metric,
            "n": self.images,
            "seed": self.seed,
            "features": function_name(self.function),
            "reference": self.reference.name,
            "reference images": self.reference.count,
            **self.sampling.describe(),
        }


class PairedScore:
    """Mean squared difference of a candidate's final pictures to those of a network and list that are taken as right,
    from the same noise: far less noisy than a distance of distributions, and blind to what real pictures look like.

    Args:
        target: the full-precision network.
        target_timesteps: its list, ascending: a long one, or the candidate's own when only bits differ (None).
    """

    metric = "paired"

    def __init__(
        self,
        sampling: Sampling,
        target: nn.Module,
        target_timesteps: Sequence[int] | None,
        *,
        images: int = 64,
        seed: int = 0,
    ) -> None:
        self.sampling, self.target, self.images, self.seed = sampling, target, images, seed
        self.target_timesteps = None if target_timesteps is None else tuple(target_timesteps)
        self._known: dict[tuple[tuple[int, ...], int, int], Tensor] = {}

    def __call__(
        self,
        network: nn.Module,
        timesteps: Sequence[int],
        *,
        images: int | None = None,
        seed: int | None = None,
        before: Callable[[int], None] | None = None,
    ) -> Scored:
        """See `Score`; values are clipped as pictures are."""
        images, seed = images or self.images, self.seed if seed is None else seed
        key = (self.target_timesteps or tuple(timesteps), images, seed)
        if key not in self._known:
            if len(self._known) > 8:
                self._known.pop(next(iter(self._known)))
            self._known[key] = self.sampling(self.target, key[0], images, seed).clamp(self.sampling.low, 1)
        samples = self.sampling(network, timesteps, images, seed, before=before)
        bad = int((~torch.isfinite(samples.flatten(1)).all(1)).sum())
        if bad:
            return Scored(math.inf, f"{bad} of {images} images are not finite")
        return Scored(
            float((samples.clamp(self.sampling.low, 1) - self._known[key]).square().mean(dtype=torch.float64))
        )

    def describe(self) -> dict[str, Any]:
        target = None if self.target_timesteps is None else list(self.target_timesteps)
        return {
            "metric": self.metric,
            "n": self.images,
            "seed": self.seed,
            "target timesteps": target,
            **self.sampling.describe(),
        }


def frechet_score(
    model: nn.Module,
    scheduler: Any,
    *,
    features: str | FeatureFunction = "digits",
    reference: Tensor | Path | str | Reference = "digits",
    images: int = 2000,
    seed: int = 0,
    labels: Sequence[int] = (),
    guidance: float | None = None,
    feature_options: Mapping[str, Any] | None = None,
    **sampling: Any,
) -> FrechetScore:
    """A score: Frechet distance of `images` pictures to real ones, the same noise and labels for every candidate.

    Args:
        model: for the shape of its input and its classes; any of a search's candidates.
        scheduler: a diffusers scheduler, for its noise schedule and prediction type.
        features: see `features.feature_function`, or a function of uint8 pictures.
        reference: real pictures, uint8 [n, h, w, c]; an .npz file of them or of `mu` and `sigma`; or "digits".
        labels: classes of class-conditional models, repeated over the images.
        feature_options: of `feature_function`.
        sampling: further fields of `Sampling`: sampler, eta, final_alpha, cond, uncond, batch_size.

    Raises:
        InputError: an option does not fit.
    """
    if images < 2:
        raise InputError("images", found=images, expected="at least 2")
    function = feature_function(features, **(feature_options or {})) if isinstance(features, str) else features
    made = Sampling.of(model, scheduler, labels=labels, guidance=guidance, **sampling)
    return FrechetScore(made, function, Reference.of(reference, function), images, seed)
