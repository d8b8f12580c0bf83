"""Networks from files: a diffusers model or pipeline folder, or a safetensors file with its configuration beside it."""

import json
from pathlib import Path
from typing import Any

from papercore.errors import InputError, located
from papercore.rundir import read_json
from papercore.weights import load_exactly, read_tensors
from torch import nn

from tmpqdm.models import FAMILIES

WEIGHTS = "diffusion_pytorch_model.safetensors"
PARTS = ("unet", "transformer")
"""where a pipeline keeps its network"""


def load_model(path: Path) -> nn.Module:
    """The network of a folder or file, float32, on the CPU, in evaluation mode.

    Args:
        path: a folder with config.json and safetensors, a pipeline folder with `unet` or `transformer` in it, or
            NAME.safetensors with NAME.json beside it, whose "config" is the diffusers configuration; or the weights
            of one of the networks of `mnist`.

    Raises:
        InputError: missing, damaged, or no UNet2DModel, UNet2DConditionModel or DiTTransformer2DModel.
    """
    import diffusers

    path = Path(path)
    if not path.exists():
        raise InputError("model", where=path, found="nothing", expected="a folder or a .safetensors file")
    if path.is_dir():
        path = next((path / part for part in PARTS if (path / part / "config.json").exists()), path)
        where, weights = path / "config.json", path / WEIGHTS
        config = read_json(where)
        if not weights.exists():
            raise InputError("weights", where=weights, found="nothing", expected="a safetensors file")
    else:
        where, weights = path.with_suffix(".json"), path
        if not where.exists():
            from tmpqdm.mnist import load_mnist

            known = load_mnist(path)
            if known is not None:
                return known
        config = read_json(where)
        config = config.get("config") if isinstance(config, dict) else None
    if isinstance(config, dict) and "_class_name" not in config and "num_embeds_ada_norm" in config:
        config = config | {"_class_name": "DiTTransformer2DModel"}  # no other family has this field
    if not isinstance(config, dict) or config.get("_class_name") not in FAMILIES:
        found = config.get("_class_name", "none") if isinstance(config, dict) else "no configuration"
        raise InputError("_class_name", where=where, found=found, expected=f"one of {', '.join(FAMILIES)}")
    with located(where):
        try:
            model = getattr(diffusers, config["_class_name"]).from_config(config)
        except (TypeError, ValueError, KeyError) as error:
            raise InputError("configuration", found=str(error), expected="one that the class accepts") from error
    tensors = read_tensors(weights)
    load_exactly(model, {name: value.float() for name, value in tensors.items()}, weights)
    return model.eval()


def load_scheduler(path: Path) -> Any:
    """The noise schedule of a pipeline folder, else 1000 linear betas from 1e-4 to 0.02 that predict noise."""
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    file = Path(path) / "scheduler" / "scheduler_config.json"
    if not file.exists():
        return DDPMScheduler()
    config = read_json(file)
    keep = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")
    if not isinstance(config, dict):
        raise InputError("scheduler", where=file, found=json.dumps(config)[:40], expected="an object")
    return DDPMScheduler(**{name: config[name] for name in keep if config.get(name) is not None})
