"""Networks by name: those of the CIFAR-100 protocol, trained ones for CIFAR-10, any of timm."""

import re
from collections.abc import Callable

from papercore.errors import InputError
from torch import nn

from dpk.models.mobile import MobileNetV2, ShuffleNetV1, ShuffleNetV2
from dpk.models.resnet import cifar_resnet, resnet50
from dpk.models.vgg import VGG
from dpk.models.wide_resnet import WideResNet

FIXED: dict[str, Callable[[int], nn.Module]] = {
    "resnet8x4": lambda classes: cifar_resnet(8, classes, wide=True),
    "resnet32x4": lambda classes: cifar_resnet(32, classes, wide=True),
    "resnet50": resnet50,
    "mobilenetv2": MobileNetV2,
    "shufflenetv1": ShuffleNetV1,
    "shufflenetv2": ShuffleNetV2,
}
FAMILIES = "resnet8, resnet20, resnet32, resnet44, resnet56, resnet110, wrn_16_2, wrn_40_1, wrn_40_2, vgg8, vgg13"


def create_model(name: str, classes: int = 100) -> nn.Module:
    """A network with fresh weights.

    Args:
        name: one of the protocol (resnet20, resnet8x4, resnet50, wrn_40_2, vgg13, mobilenetv2, shufflenetv1,
            shufflenetv2, ...), "cifar10_resnet20" and the like (shortcuts without parameters, as the widely used
            trained ones), or "timm:NAME".

    Raises:
        InputError: no such network.
    """
    if classes < 1:
        raise InputError("classes", found=classes, expected="at least 1")
    if name in FIXED:
        return FIXED[name](classes)
    if name.startswith("timm:"):
        import timm

        if not timm.is_model(name[5:]):
            raise InputError("network", found=name, expected="timm: and the name of one of its models")
        return timm.create_model(name[5:], num_classes=classes)
    if match := re.fullmatch(r"(cifar10_)?resnet(\d+)", name):
        if match[1]:
            from papercore.data.cifar_resnet import CifarResNet

            return CifarResNet(int(match[2]), classes)
        return cifar_resnet(int(match[2]), classes)
    if match := re.fullmatch(r"wrn_(\d+)_(\d+)", name):
        return WideResNet(int(match[1]), int(match[2]), classes)
    if match := re.fullmatch(r"vgg(\d+)", name):
        return VGG(int(match[1]), classes)
    raise InputError("network", found=name, expected=f"{FAMILIES}, {', '.join(FIXED)}, or timm:NAME")
