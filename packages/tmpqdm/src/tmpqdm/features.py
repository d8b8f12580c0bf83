"""Feature functions: uint8 pictures [n, height, width, channels] -> features [n, d], where distances are measured."""

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from papercore.errors import InputError
from torch import Tensor, nn

FeatureFunction = Callable[[Tensor], Any]
"""pictures -> [n, d] as tensor or array, or a mapping with it under "features" """


def feature_function(
    name: str, *, data: Path | None = None, weights: Path | None = None, device: str = "cpu"
) -> FeatureFunction:
    """A feature function by name.

    Args:
        name: "digits" (a classifier of handwritten digits), "pixels", "cifar" (a ResNet-56 trained on CIFAR-10, from a
            data folder), "inception" (torch-fidelity with its weight file), or "module:function".
        data: the data folder, for "cifar".
        weights: torch-fidelity's weight file, for "inception".

    Raises:
        InputError: no such function, or what it needs is missing.
    """
    if name == "digits":
        return digits_features
    if name == "pixels":
        return pixels
    if name == "cifar":
        from papercore.data.cifar_resnet import CifarFeatures

        if data is None:
            raise InputError("features cifar", found="no data folder", expected="the folder with the trained ResNet-56")
        return CifarFeatures(data, device)
    if name == "inception":
        return Inception(weights, device)
    module, colon, function = name.partition(":")
    if not colon or not module or not function or module.startswith("."):
        raise InputError("features", found=name, expected="digits, pixels, cifar, inception or module:function")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise InputError("features", found=name, expected="an importable module:function", hint=str(error)) from error


def pixels(images: Tensor) -> Tensor:
    """The pictures themselves, in [-1, 1]."""
    return images.flatten(1).double() / 127.5 - 1


def digits_features(images: Tensor) -> Tensor:
    """64 hidden activations of the digits classifier; larger square pictures (MNIST) are averaged down to 8x8.

    Raises:
        InputError: not one channel, or smaller than 8x8.
    """
    from papercore.data.digits import features

    if images.shape[-1] != 1 or images.shape[1] != images.shape[2] or images.shape[1] < 8:
        raise InputError("image size", found=tuple(images.shape[1:]), expected="square, one channel, at least 8x8")
    x = images.permute(0, 3, 1, 2).float() / 127.5 - 1
    return features(nn.functional.adaptive_avg_pool2d(x, 8) if x.shape[-1] > 8 else x)


class Inception:
    """Pooled features [n, 2048] of the 2015 Inception graph that FID is defined with, through torch-fidelity.

    Args:
        weights: torch-fidelity's weight file, already on this machine.

    Raises:
        InputError: torch-fidelity is not installed, or the file is missing or is no state dict.
    """

    def __init__(self, weights: Path | None, device: str = "cpu") -> None:
        try:
            extractor = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
        except ImportError as error:
            raise InputError(
                "features inception", found="no torch-fidelity", expected="pip install torch-fidelity"
            ) from error
        if weights is None or not Path(weights).is_file():
            raise InputError("Inception weights", found=weights, expected="torch-fidelity's weight file")
        try:
            torch.load(weights, map_location="cpu", weights_only=True)  # nothing but tensors reaches the library
        except Exception as error:
            raise InputError("Inception weights", where=weights, found=str(error), expected="a state dict") from error
        self.network = extractor.FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(weights)
        ).to(device)
        self.device = device

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        if images.shape[-1] != 3:
            raise InputError("image size", found=tuple(images.shape[1:]), expected="three channels for Inception")
        parts = images.permute(0, 3, 1, 2).split(50)
        return torch.cat([self.network(part.to(self.device))[0].cpu() for part in parts])


def extract(function: FeatureFunction, images: Tensor) -> NDArray[np.float64]:
    """Features of pictures, checked.

    Raises:
        InputError: something else than [n, d] numbers.
    """
    with torch.no_grad():
        found = function(images)
    if isinstance(found, Mapping):
        found = found.get("features", ())
    array = np.asarray(found.detach().cpu() if isinstance(found, Tensor) else found, dtype=np.float64)
    if array.ndim != 2 or len(array) != len(images):
        raise InputError("features", found=f"shape {array.shape}", expected=f"[{len(images)}, dimensions]")
    return array


def function_name(function: FeatureFunction) -> str:
    """How a record calls a feature function."""
    kind = function if hasattr(function, "__qualname__") else type(function)
    return f"{kind.__module__}:{kind.__qualname__}"
