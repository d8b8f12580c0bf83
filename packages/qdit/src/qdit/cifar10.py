"""The CIFAR-10 DiT of the small scale, from a data folder.

weights/cifar10_dit_w256_d8_h4_p4.safetensors and .json     the DiT, diffusers naming
"""

import json
from pathlib import Path

from diffusers import DiTTransformer2DModel
from papercore.errors import InputError
from papercore.rundir import read_json
from papercore.weights import read_tensors

from qdit.pipeline import build_model, fill

DIT = "weights/cifar10_dit_w256_d8_h4_p4"


def load_dit(data: Path) -> DiTTransformer2DModel:
    """The trained DiT: 32 x 32 pixels in [-1, 1], patch 4, width 256, depth 8; class 10 stands for no class.

    Raises:
        InputError: a file is missing, damaged, or describes another model.
    """
    description = read_json(data / f"{DIT}.json")
    if not isinstance(description, dict) or not isinstance(description.get("config"), dict):
        raise InputError("config", where=data / f"{DIT}.json", found=json.dumps(description)[:60], expected="a mapping")
    config = {key: value for key, value in description["config"].items() if key != "_class_name"}
    model = build_model(config, data / f"{DIT}.json")
    path = data / f"{DIT}.safetensors"
    fill(model, {name: (value.float(), path) for name, value in read_tensors(path).items()})
    return model.eval()
