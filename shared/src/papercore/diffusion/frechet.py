"""The Frechet distance between two sets of features seen as normal distributions (arXiv 1706.08500).

|m1 - m2|^2 + tr S1 + tr S2 - 2 tr sqrt(S1 S2), with covariances over n - 1. No clipping of negative results.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from papercore.errors import InputError


def statistics(features: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean [d] and covariance [d, d] (over n - 1) of features [n, d], float64.

    Raises:
        InputError: fewer than two samples, another shape, or values that are not finite.
    """
    x = np.asarray(features, dtype=np.float64)
    if x.ndim != 2 or len(x) < 2:
        raise InputError("features", found=f"shape {x.shape}", expected="[samples, dimensions] with at least 2 samples")
    if not np.isfinite(x).all():
        raise InputError(
            "features", found=f"{int((~np.isfinite(x)).sum())} values that are not finite", expected="none"
        )
    centred = x - x.mean(0)
    return x.mean(0), centred.T @ centred / (len(x) - 1)


def frechet_distance(mu1: ArrayLike, sigma1: ArrayLike, mu2: ArrayLike, sigma2: ArrayLike) -> float:
    """The distance from means [d] and covariances [d, d].

    tr sqrt(S1 S2) is computed as the sum of the square roots of the eigenvalues of R S2 R with R = sqrt(S1): the same
    number, but symmetric, so that rank-deficient covariances (fewer samples than dimensions) need no special case.
    """
    m1, s1, m2, s2 = (np.asarray(value, dtype=np.float64) for value in (mu1, sigma1, mu2, sigma2))
    if m1.shape != m2.shape or s1.shape != s2.shape or s1.shape != (m1.size, m1.size):
        raise InputError(
            "Frechet statistics", found=f"{m1.shape}, {s1.shape} and {m2.shape}, {s2.shape}", expected="equal sizes"
        )
    values, vectors = np.linalg.eigh((s1 + s1.T) / 2)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    product = root @ ((s2 + s2.T) / 2) @ root
    trace = np.sqrt(np.clip(np.linalg.eigvalsh((product + product.T) / 2), 0, None)).sum()
    return float(((m1 - m2) ** 2).sum() + np.trace(s1) + np.trace(s2) - 2 * trace)
