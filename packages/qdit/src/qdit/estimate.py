"""What a setting costs, from a model's shapes alone."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from papercore.errors import InputError
from papercore.rundir import read_json
from torch import nn

from qdit.blockwise import cost_of
from qdit.config import QDiTConfig
from qdit.granularity import costs
from qdit.pipeline import build_model
from qdit.targets import find_targets


@dataclasses.dataclass(frozen=True)
class ModelCost:
    """Sizes in bytes and counts of a quantised model."""

    parameters: int
    quantised_weights: int
    bits_per_weight: float
    """of the quantised weights, with scales and zero points of as many bits as a code"""
    rescales_per_token: int
    """float multiply-adds for the groups of every token"""
    stored_bytes: int
    """of the file as it is written: zero points take a byte, the rest of the model `rest_bits`"""
    full_bytes: int
    """the whole model in `rest_bits`"""


def model_cost(model: nn.Module | Path, config: QDiTConfig, *, rest_bits: int = 16) -> ModelCost:
    """The cost of `model`, a module (on any device, also meta) or the folder or `config.json` of a DiT.

    Args:
        rest_bits: of every parameter that is not quantised, biases included.

    Raises:
        InputError: no such model, or a setting that does not fit it.
    """
    if isinstance(model, Path):
        path = model / "config.json" if model.is_dir() else model
        described = read_json(path)
        if not isinstance(described, dict) or described.get("_class_name") != "DiTTransformer2DModel":
            raise InputError("_class_name", where=path, found=str(described)[:40], expected="'DiTTransformer2DModel'")
        described.pop("quantization_config", None)
        with torch.device("meta"):
            model = build_model(described, path)
    targets = [target for target in find_targets(model, config) if target.spec.wbits < 16]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    weights = sum(target.rows * target.columns for target in targets)
    layers = [cost_of(target) for target in targets]
    zero_bytes = 0 if config.w_sym else 1
    packed = sum(layer.packed_bytes + layer.scale_bytes + zero_bytes * layer.groups for layer in layers)
    bits = sum(layer.bits_per_weight * t.rows * t.columns for layer, t in zip(layers, targets, strict=True))
    plain = [target for target in targets if target.spec.abits < 16]
    rescales = costs(plain, config, [target.spec.group_size for target in plain])["rescales_per_token"] if plain else 0
    return ModelCost(
        parameters=parameters,
        quantised_weights=weights,
        bits_per_weight=bits / weights if weights else float(rest_bits),
        rescales_per_token=int(rescales),
        stored_bytes=packed + (parameters - weights) * rest_bits // 8,
        full_bytes=parameters * rest_bits // 8,
    )


def as_result(cost: ModelCost) -> dict[str, Any]:
    """What `qdit estimate` prints."""
    return {**dataclasses.asdict(cost), "ratio": cost.stored_bytes / cost.full_bytes}
