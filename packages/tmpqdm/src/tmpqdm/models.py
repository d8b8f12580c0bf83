"""What the package asks of a noise-prediction network: called as (x, t, **conditions), one tensor back.

The shape of its inputs is known for the three families of diffusers; any other module is shown by an example.
"""

from collections.abc import Mapping
from typing import Any

import torch
from papercore.errors import InputError
from torch import Tensor, nn

FAMILIES = ("UNet2DModel", "UNet2DConditionModel", "DiTTransformer2DModel")

Conditions = Mapping[str, Tensor]
"""keyword arguments of the model; a dot stands for a mapping: "added_cond_kwargs.text_embeds" """


def predict(model: nn.Module, x: Tensor, t: Tensor, cond: Conditions) -> Tensor:
    """The network's output, whatever it wraps it in."""
    output = model(x, t, **nested(cond))
    if isinstance(output, Tensor):
        return output
    return output[0]


def nested(cond: Conditions) -> dict[str, Any]:
    """Conditions as keyword arguments."""
    arguments: dict[str, Any] = {}
    for name, value in cond.items():
        *outer, last = name.split(".")
        place = arguments
        for part in outer:
            place = place.setdefault(part, {})
        place[last] = value
    return arguments


def check_model(model: nn.Module) -> None:
    """Raises InputError for a network that cannot be calibrated: without values, compiled, half precision on a CPU."""
    if hasattr(model, "_orig_mod"):
        raise InputError(
            "model", found="a compiled module", expected="the module itself", hint="compile solver.network instead"
        )
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise InputError(f"parameter {name}", found="on the meta device", expected="values")
        if parameter.dtype != torch.float32 and parameter.device.type == "cpu":
            raise InputError(
                f"parameter {name}",
                found=f"{parameter.dtype} on the CPU",
                expected="float32",
                hint="call model.float()",
            )


def input_shape(model: nn.Module) -> tuple[int, int, int]:
    """(channels, height, width) of the network's input.

    Raises:
        InputError: not a family that is known.
    """
    known = getattr(model, "input_shape", None)
    if known is not None:
        return known
    if type(model).__name__ not in FAMILIES:
        raise InputError(
            "model", found=type(model).__name__, expected=f"one of {', '.join(FAMILIES)}", hint="give an example"
        )
    config: Any = model.config
    size = config.sample_size
    if size is None:
        raise InputError("sample_size of the model", found="nothing", expected="a number", hint="give an example")
    height, width = (size, size) if isinstance(size, int) else size
    return config.in_channels, height, width


def example_inputs(model: nn.Module, batch: int = 1) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(x, t, cond) of the right shapes, with random values.

    Raises:
        InputError: not a family that is known, or one with conditions that its configuration does not describe.
    """
    shape = input_shape(model)
    config: Any = getattr(model, "config", None)
    parameter = next(model.parameters())
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(parameter.device, parameter.dtype)

    cond: dict[str, Tensor] = {}
    kind = type(model).__name__
    if getattr(model, "classes", None):
        cond["class_labels"] = torch.zeros(batch, dtype=torch.long, device=parameter.device)
    classes = torch.zeros(batch, dtype=torch.long, device=parameter.device)
    if kind == "DiTTransformer2DModel" or (getattr(config, "class_embed_type", None) is None
                                           and getattr(config, "num_class_embeds", None)):  # fmt: skip
        cond["class_labels"] = classes
    elif getattr(config, "class_embed_type", None) == "timestep":
        cond["class_labels"] = classes.to(parameter.dtype)
    elif getattr(config, "class_embed_type", None) is not None:
        raise InputError("class embedding of the model", found=config.class_embed_type, expected="none, timestep or a "
                         "number of classes", hint="give an example")  # fmt: skip
    if kind == "UNet2DConditionModel":
        if getattr(config, "addition_embed_type", None) or not isinstance(config.cross_attention_dim, int):
            raise InputError("conditions of the model", found="more than one text embedding", hint="give an example")
        cond["encoder_hidden_states"] = random(batch, 4, config.cross_attention_dim)
    return random(batch, *shape), torch.full((batch,), 500, device=parameter.device), cond


def as_example(example: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(x, t, cond) of one sample from (x, t), (x, t, cond) or a calibration set."""
    x, t, *rest = (example.x, example.t, example.cond) if hasattr(example, "cond") else example
    return x[:1], t[:1], {name: value[:1] for name, value in (rest[0] if rest else {}).items()}
