"""Metrics of image generators on given features, with the definitions of the ADM evaluator (arXiv 2105.05233).

The Frechet distance is `papercore.diffusion.frechet_distance`; sFID is the same distance on spatial features.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray
from papercore.errors import InputError


def precision_recall(reference: ArrayLike, sample: ArrayLike, k: int = 3) -> tuple[float, float]:
    """Share of samples on the reference's manifold, and of references on the samples' (arXiv 1904.06991).

    A set's manifold is the union of balls around its points that reach to the k-th nearest neighbour within the set.

    Args:
        reference, sample: features [n, d] and [m, d].

    Raises:
        InputError: fewer than k + 1 points in a set, different dimensions, or values that are not finite.
    """
    sets = [np.asarray(values, dtype=np.float64) for values in (reference, sample)]
    for name, values in zip(("reference", "sample"), sets, strict=True):
        if values.ndim != 2 or len(values) < k + 1:
            raise InputError(f"{name} features", found=f"shape {values.shape}", expected=f"[n, d] with n >= {k + 1}")
        if not np.isfinite(values).all():
            raise InputError(f"{name} features", found="values that are not finite", expected="finite ones")
    if sets[0].shape[1] != sets[1].shape[1]:
        raise InputError("features", found=f"{sets[1].shape[1]} dimensions", expected=str(sets[0].shape[1]))
    real, made = sets
    return _covered(made, real, _radii(real, k)), _covered(real, made, _radii(made, k))


def inception_score(probabilities: ArrayLike, split_size: int = 5000) -> float:
    """Mean over blocks of exp(mean KL(p(y|x) || p(y))), blocks of `split_size` in order (arXiv 1606.03498).

    Args:
        probabilities: [n, classes], rows that sum to 1.

    Raises:
        InputError: another shape, an empty set, or rows that are no distribution.
    """
    p = np.asarray(probabilities, dtype=np.float64)
    if p.ndim != 2 or len(p) == 0 or split_size < 1:
        raise InputError("probabilities", found=f"shape {p.shape}", expected="[n, classes] with n > 0")
    if not (np.isfinite(p).all() and (p >= 0).all() and np.allclose(p.sum(1), 1, atol=1e-3)):
        raise InputError("probabilities", found="rows that are no distribution", expected="rows >= 0 that sum to 1")
    scores = []
    for first in range(0, len(p), split_size):
        part = p[first : first + split_size]
        with np.errstate(divide="ignore", invalid="ignore"):
            terms = np.where(part > 0, part * (np.log(part) - np.log(part.mean(0, keepdims=True))), 0.0)
        scores.append(np.exp(terms.sum(1).mean()))
    return float(np.mean(scores))


def _squared_distances(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.maximum((a**2).sum(1)[:, None] - 2 * a @ b.T + (b**2).sum(1)[None], 0)


def _radii(points: NDArray[np.float64], k: int, rows: int = 1024) -> NDArray[np.float64]:
    """Squared distance of every point to its k-th neighbour; the point itself is neighbour 0."""
    parts = []
    for first in range(0, len(points), rows):
        distances = _squared_distances(points[first : first + rows], points)
        np.put_along_axis(distances, np.arange(first, first + len(distances))[:, None], 0, 1)
        parts.append(np.partition(distances, k, axis=1)[:, k])
    return np.concatenate(parts)


def _covered(
    points: NDArray[np.float64], centres: NDArray[np.float64], radii: NDArray[np.float64], rows: int = 1024
) -> float:
    """Share of `points` that lie in a ball around one of `centres`."""
    inside = [
        (_squared_distances(points[first : first + rows], centres) <= radii[None]).any(1)
        for first in range(0, len(points), rows)
    ]
    return float(np.concatenate(inside).mean())
