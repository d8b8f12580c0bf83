"""How far generated pictures are from real ones, in a chosen feature space (specification 5.4).

Pictures are uint8 in `.npz` files under `arr_0`, as evaluators of image generators write them. Features may come from a
file instead: `.npz` with `features` [n, d] and, if there are, `spatial` [n, s] and `probabilities` [n, classes]. A
reference batch may hold statistics of a whole data set instead: `mu`, `sigma`, and `mu_s`, `sigma_s` of the spatial
features.
"""

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from papercore.data import digits
from papercore.diffusion import frechet_distance, statistics
from papercore.errors import InputError, located
from papercore.images import images_from_uint8, images_to_uint8, read_arrays, read_images
from torch import Tensor

from qdit.metrics import inception_score, precision_recall

Array = NDArray[Any]


@dataclasses.dataclass(frozen=True)
class Features:
    """What a feature space says about a set of images."""

    features: Array
    """[n, d], for the Frechet distance, precision and recall"""
    spatial: Array | None = None
    """[n, s], for sFID"""
    probabilities: Array | None = None
    """[n, classes], for the inception score"""


FeatureSpace = Callable[[Tensor], Any]
"""uint8 images [n, height, width, channels] -> features [n, d] (tensor or array), or a mapping with the fields of
`Features`"""


def feature_space(name: str, weights: Path | None = None) -> FeatureSpace:
    """ "digits" (a classifier trained on handwritten digits), "pixels", "inception" (needs torch-fidelity and a file of
    its weights), or "module:function".

    Raises:
        InputError: no such space.
    """
    if name == "digits":
        return _digits
    if name == "pixels":
        return lambda images: images_from_uint8(images).flatten(1)
    if name == "inception":
        from qdit.inception import Inception

        return Inception(weights)
    module, colon, function = name.partition(":")
    if not colon or not module or not function or module.startswith("."):
        raise InputError("feature space", found=name, expected="digits, pixels, inception or module:function")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise InputError(
            "feature space", found=name, expected="an importable module:function", hint=str(error)
        ) from error


def _digits(images: Tensor) -> Mapping[str, Tensor]:
    if tuple(images.shape[1:]) != (8, 8, 1):
        raise InputError("image size", found=tuple(images.shape[1:]), expected="(8, 8, 1) for the digits classifier")
    x = images_from_uint8(images)
    with torch.no_grad():
        probabilities = torch.cat([digits.classifier()(part).softmax(1) for part in x.split(512)])
    return {"features": digits.features(x), "probabilities": probabilities}


def reference_images(reference: str) -> Tensor:
    """The images of an `.npz` file, or all handwritten digits for "digits"."""
    if reference == "digits":
        return images_to_uint8(digits.digits("all").images)
    return read_images(Path(reference))


def describe(images: Tensor, space: FeatureSpace) -> Features:
    """The features of images in a space.

    Raises:
        InputError: the space gives something else.
    """
    try:
        with torch.no_grad():
            found = space(images)
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            "feature space", found=f"a function that fails ({error!r})", expected="features [n, d]"
        ) from error
    if not isinstance(found, Mapping):
        found = {"features": found}
    arrays = {
        key: value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
        for key, value in found.items()
        if value is not None
    }
    return _checked(arrays, len(images), "feature space")


def read_features(path: Path) -> Features | None:
    """The features in an `.npz` file, or None when it holds images.

    Raises:
        InputError: not such a file; arrays of other shapes.
    """
    arrays = read_arrays(path, without="arr_0")
    return _checked(arrays, None, path) if "features" in arrays else None


def read_statistics(path: Path) -> dict[str, Array]:
    """`mu`, `sigma` and perhaps `mu_s`, `sigma_s` of a reference batch; empty when it has none."""
    arrays = read_arrays(path, without="arr_0")
    return {name: arrays[name] for name in ("mu", "sigma", "mu_s", "sigma_s") if name in arrays}


def _checked(arrays: Mapping[str, Array], count: int | None, where: object) -> Features:
    known = {field.name for field in dataclasses.fields(Features)}
    for name in arrays:
        if name not in known and name not in ("mu", "sigma", "mu_s", "sigma_s"):
            raise InputError(f"key {name}", where=where, found="a name that does not exist", expected=", ".join(known))
    if "features" not in arrays:
        raise InputError("key features", where=where, found=", ".join(arrays) or "nothing", expected="features [n, d]")
    count = len(arrays["features"]) if count is None else count
    for name in known & set(arrays):
        array = arrays[name]
        if array.ndim != 2 or len(array) != count or array.dtype.kind != "f":
            raise InputError(
                f"key {name}", where=where, found=f"{array.dtype} {array.shape}", expected=f"floats [{count}, d]"
            )
    return Features(**{name: arrays[name] for name in known & set(arrays)})


def compare(samples: Features, reference: Features | None, stored: Mapping[str, Array] | None = None) -> dict[str, Any]:
    """All metrics that the features allow.

    Args:
        reference: features of the real images; may be absent when `stored` has the statistics.
        stored: `mu`, `sigma` (and `mu_s`, `sigma_s`) of the real images, used instead of those of `reference`.

    Raises:
        InputError: different dimensions, or too few points.
    """
    stored = stored or {}
    result: dict[str, Any] = {}
    for name, kind, mean, spread in (
        ("frechet_distance", "features", "mu", "sigma"),
        ("sfid", "spatial", "mu_s", "sigma_s"),
    ):
        own = getattr(samples, kind)
        other = None if reference is None else getattr(reference, kind)
        if own is None or (other is None and mean not in stored):
            continue
        real = (stored[mean], stored[spread]) if mean in stored and spread in stored else statistics(other)
        result[name] = frechet_distance(*statistics(own), *real)
    if samples.probabilities is not None:
        result["inception_score"] = inception_score(samples.probabilities)
    if reference is not None and min(len(samples.features), len(reference.features)) >= 4:
        result["precision"], result["recall"] = precision_recall(reference.features, samples.features)
    if not result:
        raise InputError("reference", found="neither features nor mu and sigma", expected="one of them")
    return result


def evaluate_files(
    samples: Path, reference: str, space: str, weights: Path | None, say: Callable[[str], None]
) -> dict[str, Any]:
    """What `qdit evaluate` prints: all metrics that the two files allow.

    Args:
        samples: `.npz` of images or of features.
        reference: the same, or of statistics, or "digits".
        space: see `feature_space`; not used for files that hold features.
        weights: of the Inception network.
        say: is told of sets that are too small for their number of dimensions.

    Raises:
        InputError: names the file and the key.
    """
    extract: FeatureSpace | None = None
    stored = {} if reference == "digits" else read_statistics(Path(reference))
    described: list[Features | None] = []
    images: list[Tensor | None] = []
    for source in (str(samples), reference):
        own = None if source == "digits" else read_features(Path(source))
        pictures = None
        if own is None and not (source == reference and stored):
            pictures = reference_images(source)
            extract = extract or feature_space(space, weights)
            with located(source):
                own = describe(pictures, extract)
        described.append(own)
        images.append(pictures)
    first, second = described
    assert first is not None
    if images[0] is not None and images[1] is not None:
        with located(samples):
            check_sizes(images[0], images[1])
    counts = [len(part.features) for part in described if part is not None]
    if min(counts) < first.features.shape[1]:
        say(
            f"warning: {min(counts)} samples for {first.features.shape[1]} feature dimensions: the Frechet distance is "
            "biased upward"
        )
    with located(samples):
        result = compare(first, second, stored)
    return {**result, "samples": counts[0], "reference": counts[1] if len(counts) > 1 else "statistics"}


def image_distance(samples: Tensor, reference: Tensor, space: str) -> tuple[float, int]:
    """Frechet distance of two sets of uint8 images [n, h, w, c], and the number of feature dimensions.

    Raises:
        InputError: images of different size, or too few.
    """
    check_sizes(samples, reference)
    extract = feature_space(space)
    first, second = describe(samples, extract).features, describe(reference, extract).features
    return frechet_distance(*statistics(first), *statistics(second)), first.shape[1]


def check_sizes(samples: Tensor, reference: Tensor) -> None:
    """Raises InputError for images of different size."""
    if samples.shape[1:] != reference.shape[1:]:
        raise InputError("image size", found=tuple(samples.shape[1:]), expected=f"{tuple(reference.shape[1:])}")
