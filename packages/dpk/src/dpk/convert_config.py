"""Configurations of mdistiller (YAML with DISTILLER, SOLVER, DATASET, ...) -> recipes of this package.

Names and numbers of that format are facts; what it leaves out has its defaults there. Settings that have no meaning
here (experiment names, logging, shapes of features) are listed as left out.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from papercore.config import load_yaml
from papercore.errors import InputError

NETWORKS = {
    "ResNet50": "resnet50",
    "MobileNetV2": "mobilenetv2",
    "ShuffleV1": "shufflenetv1",
    "ShuffleV2": "shufflenetv2",
}
"""names that differ; the others are the same"""
TYPES = {
    "NONE": "ce",
    "KD": "kd",
    "DKD": "dkd",
    "FITNET": "fitnet",
    "AT": "at",
    "REVIEWKD": "reviewkd",
}
IGNORED = ("EXPERIMENT", "LOG")


@dataclasses.dataclass(frozen=True)
class Converted:
    """A recipe's fields, and what could not be taken over."""

    recipe: dict[str, Any]
    left_out: list[str]


def convert_config(path: Path) -> Converted:
    """Reads such a file.

    Raises:
        InputError: no such file, no DISTILLER or SOLVER, or a method, data set or network that is not here.
    """
    content = load_yaml(path)
    if not isinstance(content, Mapping) or not isinstance(content.get("DISTILLER"), Mapping):
        raise InputError("DISTILLER", where=path, found="nothing", expected="a configuration of mdistiller")
    taken: set[str] = set()

    def section(name: str) -> Mapping[str, Any]:
        value = content.get(name, {})
        if not isinstance(value, Mapping):
            raise InputError(name, where=path, found=value, expected="a mapping")
        return value

    def get(of: Mapping[str, Any], prefix: str, key: str, default: Any) -> Any:
        taken.add(f"{prefix}.{key}")
        return of.get(key, default)

    distiller, solver, dataset = section("DISTILLER"), section("SOLVER"), section("DATASET")
    kind = str(get(distiller, "DISTILLER", "TYPE", "NONE"))
    if kind not in TYPES:
        raise InputError("DISTILLER.TYPE", where=path, found=kind, expected=" or ".join(TYPES))
    data = str(get(dataset, "DATASET", "TYPE", "cifar100"))
    if data not in ("cifar100", "cifar10"):
        raise InputError("DATASET.TYPE", where=path, found=data, expected="cifar100")
    if (rule := str(get(solver, "SOLVER", "TRAINER", "base"))) not in ("base", "crd"):
        raise InputError("SOLVER.TRAINER", where=path, found=rule, expected="base")
    student, teacher = (network(get(distiller, "DISTILLER", key, None), key, path) for key in ("STUDENT", "TEACHER"))
    stages = [int(epoch) for epoch in get(solver, "SOLVER", "LR_DECAY_STAGES", [150, 180, 210])]
    recipe: dict[str, Any] = {
        "student": student,
        **({} if kind == "NONE" else {"teacher": teacher}),
        **({"pairs": hint(section("FITNET"), get, student, teacher)} if kind == "FITNET" else {}),
        "dataset": data,
        "method": TYPES[kind],
        "options": options(kind, section, get),
        "solver": {
            "epochs": int(get(solver, "SOLVER", "EPOCHS", 240)),
            "batch_size": int(get(solver, "SOLVER", "BATCH_SIZE", 64)),
            "learning_rate": float(get(solver, "SOLVER", "LR", 0.05)),
            "milestones": stages,
            "gamma": float(get(solver, "SOLVER", "LR_DECAY_RATE", 0.1)),
            "weight_decay": float(get(solver, "SOLVER", "WEIGHT_DECAY", 1e-4)),
            "momentum": float(get(solver, "SOLVER", "MOMENTUM", 0.9)),
        },
    }
    present = [name for name in leaves(content) if name.partition(".")[0] not in IGNORED]
    return Converted(recipe, sorted(name for name in present if name not in taken))


def options(kind: str, section: Any, get: Any) -> dict[str, Any]:
    """The arguments of a method."""
    if kind == "KD":
        loss = section("KD").get("LOSS", {})
        return {
            "temperature": float(get(section("KD"), "KD", "TEMPERATURE", 4.0)),
            "ce_weight": float(get(loss, "KD.LOSS", "CE_WEIGHT", 0.1)),
            "weight": float(get(loss, "KD.LOSS", "KD_WEIGHT", 0.9)),
        }
    if kind == "DKD":
        of = section("DKD")
        return {
            "ce_weight": float(get(of, "DKD", "CE_WEIGHT", 1.0)),
            "alpha": float(get(of, "DKD", "ALPHA", 1.0)),
            "beta": float(get(of, "DKD", "BETA", 8.0)),
            "temperature": float(get(of, "DKD", "T", 4.0)),
            "warmup": int(get(of, "DKD", "WARMUP", 20)),
        }
    if kind in ("FITNET", "AT"):
        of, loss = section(kind), section(kind).get("LOSS", {})
        given = {
            "ce_weight": float(get(loss, f"{kind}.LOSS", "CE_WEIGHT", 1.0)),
            "weight": float(get(loss, f"{kind}.LOSS", "FEAT_WEIGHT", 100.0 if kind == "FITNET" else 1000.0)),
        }
        return given if kind == "FITNET" else given | {"power": int(get(of, "AT", "P", 2))}
    if kind == "REVIEWKD":
        of = section("REVIEWKD")
        return {
            "ce_weight": float(get(of, "REVIEWKD", "CE_WEIGHT", 1.0)),
            "weight": float(get(of, "REVIEWKD", "REVIEWKD_WEIGHT", 1.0)),
            "warmup": int(get(of, "REVIEWKD", "WARMUP_EPOCHS", 20)),
            "student_preactivation": bool(get(of, "REVIEWKD", "STU_PREACT", False)),
        }
    return {}


def hint(of: Mapping[str, Any], get: Any, student: str, teacher: str) -> list[dict[str, str]]:
    """The one pair of taps that a hint layer stands for."""
    from dpk.protocol import stage_name

    stage = int(get(of, "FITNET", "HINT_LAYER", 2))
    try:
        return [{"student": stage_name(student, stage), "teacher": stage_name(teacher, stage)}]
    except IndexError:
        raise InputError("FITNET.HINT_LAYER", found=stage, expected="0 to 4") from None


def network(name: Any, key: str, path: Path) -> str:
    """Our name of a network.

    Raises:
        InputError: none is given, or it is not here.
    """
    from dpk.networks import create_model

    if not isinstance(name, str):
        raise InputError(f"DISTILLER.{key}", where=path, found=name, expected="the name of a network")
    ours = NETWORKS.get(name, name)
    import torch

    with torch.device("meta"):
        create_model(ours)
    return ours


def leaves(content: Mapping[str, Any], prefix: str = "") -> list[str]:
    """All keys with a value that is no mapping, joined by dots."""
    found = []
    for key, value in content.items():
        if isinstance(value, Mapping):
            found += leaves(value, f"{prefix}{key}.")
        else:
            found.append(f"{prefix}{key}")
    return found
