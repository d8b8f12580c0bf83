"""How far generated pictures are from real ones: the Frechet distance in a chosen feature space."""

import importlib
from collections.abc import Callable
from pathlib import Path

import torch
from papercore.data import digits
from papercore.diffusion import frechet_distance, statistics
from papercore.errors import InputError
from papercore.images import images_from_uint8, images_to_uint8, read_images
from torch import Tensor

Features = Callable[[Tensor], Tensor]
"""uint8 images [n, height, width, channels] -> features [n, d]"""


def feature_space(name: str) -> Features:
    """ "digits" (a classifier trained on handwritten digits), "pixels", or "module:function".

    Raises:
        InputError: no such space.
    """
    if name == "digits":
        return lambda images: digits.features(images_from_uint8(images))
    if name == "pixels":
        return lambda images: images_from_uint8(images).flatten(1)
    module, colon, function = name.partition(":")
    if not colon:
        raise InputError("feature space", found=name, expected="digits, pixels or module:function")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise InputError(
            "feature space", found=name, expected="an importable module:function", hint=str(error)
        ) from error


def reference_images(reference: str) -> Tensor:
    """The images of an `.npz` file, or all handwritten digits for "digits"."""
    if reference == "digits":
        return images_to_uint8(digits.digits("all").images)
    return read_images(Path(reference))


def image_distance(samples: Tensor, reference: Tensor, space: str) -> tuple[float, int]:
    """Frechet distance of two sets of uint8 images [n, h, w, c], and the number of feature dimensions.

    Raises:
        InputError: images of different size, or too few.
    """
    if samples.shape[1:] != reference.shape[1:]:
        raise InputError("image size", found=f"{tuple(samples.shape[1:])}", expected=f"{tuple(reference.shape[1:])}")
    if space == "digits" and tuple(samples.shape[1:]) != (8, 8, 1):
        raise InputError(
            "image size", found=f"{tuple(samples.shape[1:])}", expected="(8, 8, 1) for the digits classifier"
        )
    features = feature_space(space)
    first, second = features(samples), features(reference)
    for value in (first, second):
        if not isinstance(value, torch.Tensor) or value.ndim != 2:
            raise InputError("feature space", found=space, expected="a function that gives a tensor [n, d]")
    distance = frechet_distance(*statistics(first.numpy()), *statistics(second.numpy()))
    return distance, first.shape[1]
