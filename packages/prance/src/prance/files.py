"""Networks, selectors and decisions as files: safetensors beside one JSON file; decisions as JSON lines."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from papercore.errors import InputError
from papercore.rundir import atomic, read_json, write_json
from papercore.weights import load_exactly, read_tensors
from safetensors.torch import save_file
from torch import nn

from prance.adaptive import Prediction
from prance.data import Normalisation
from prance.selector import Selector
from prance.space import SearchSpace
from prance.supernet import Block, MetaViT

VERSION = 1


def save_network(
    net: MetaViT, folder: Path | str, *, normalisation: Normalisation | None = None, classes: Sequence[str] = ()
) -> None:
    """Writes `net.safetensors` and `net.json`.

    Raises:
        InputError: a norm of queries and keys that is no layer norm.
    """
    folder = Path(folder)
    first = net.blocks[0]
    assert isinstance(first, Block)
    if not isinstance(first.q_norm, nn.Identity | nn.LayerNorm):
        raise InputError("norm of queries", found=type(first.q_norm).__name__, expected="a layer norm, to be saved")
    described = {
        "format_version": VERSION,
        "space": dataclasses.asdict(net.space),
        "num_classes": net.num_classes,
        "image_size": net.image_size,
        "patch_size": net.patch_size,
        "channels": net.channels,
        "class_token": net.cls_token is not None,
        "registers": 0 if net.reg_token is None else net.reg_token.shape[1],
        "pool": net.pool,
        "eps": first.norm1.eps,
        "layer_scale": first.scale1 is not None,
        "qkv_bias": first.qkv_bias is not None,
        "residual_projection": any(isinstance(b, Block) and b.residual is not None for b in net.blocks),
        "qk_norm": isinstance(first.q_norm, nn.LayerNorm),
        "norms": {name: getattr(net, name) is not None for name in ("norm_pre", "norm", "fc_norm")},
        "classes": list(classes),
        "normalisation": dataclasses.asdict(normalisation or Normalisation()),
    }
    write_json(folder / "net.json", described)
    _save(net, folder / "net.safetensors")


def load_network(folder: Path | str) -> tuple[MetaViT, Normalisation, list[str]]:
    """(network in evaluation mode, normalisation of its pictures, names of its classes).

    Raises:
        InputError: no such files, another version, or weights of another network.
    """
    folder = Path(folder)
    described = _described(folder / "net.json")
    try:
        norms, qk_norm = described.pop("norms"), described.pop("qk_norm")
        classes = [str(name) for name in described.pop("classes")]
        normalisation = Normalisation(*(tuple(described["normalisation"][key]) for key in ("mean", "std")))
        described.pop("normalisation")
        space = SearchSpace(**described.pop("space"))
        net = MetaViT(space, described.pop("num_classes"), **described)
        eps = described["eps"]
    except (KeyError, TypeError) as error:
        raise InputError("description of a network", where=folder / "net.json", found=repr(error)) from error
    for name, there in norms.items():
        setattr(net, name, nn.LayerNorm(space.width, eps) if there else None)
    for block in net.blocks:
        if qk_norm and isinstance(block, Block):
            block.q_norm, block.k_norm = nn.LayerNorm(space.head_dim, eps), nn.LayerNorm(space.head_dim, eps)
    path = folder / "net.safetensors"
    load_exactly(net, read_tensors(path), path)
    return net.eval(), normalisation, classes


def save_selector(selector: Selector, folder: Path | str) -> None:
    """Writes `selector.safetensors` and `selector.json`."""
    folder = Path(folder)
    described = {
        "format_version": VERSION,
        "space": dataclasses.asdict(selector.space),
        "tokens": selector.tokens,
        "mode": selector.mode,
        "hidden": selector.actor.fc1.out_features,
        "normalise": selector.normalise,
        "budget": selector.budget,
    }
    write_json(folder / "selector.json", described)
    _save(selector, folder / "selector.safetensors")


def load_selector(folder: Path | str) -> Selector:
    """In evaluation mode.

    Raises:
        InputError: no such files, another version, or weights that do not fit.
    """
    folder = Path(folder)
    described = _described(folder / "selector.json")
    try:
        space = SearchSpace(**described.pop("space"))
        selector = Selector(space, described.pop("tokens"), described.pop("mode"), **described)
    except (KeyError, TypeError) as error:
        raise InputError("description of a selector", where=folder / "selector.json", found=repr(error)) from error
    path = folder / "selector.safetensors"
    load_exactly(selector, read_tensors(path), path)
    return selector.eval()


def _described(path: Path) -> dict[str, Any]:
    described = read_json(path)
    if not isinstance(described, dict) or described.pop("format_version", None) != VERSION:
        raise InputError("format_version", where=path, expected=VERSION)
    return described


def _save(module: nn.Module, path: Path) -> None:
    tensors = {name: value.detach().cpu().clone().contiguous() for name, value in module.state_dict().items()}
    with atomic(path) as temporary:
        save_file(tensors, temporary)


def write_decisions(path: Path, prediction: Prediction, ids: Sequence[str]) -> None:
    """One JSON line an image: id, embed, mlp_ratio, keep, merge, tokens, macs, pred, prob."""
    predicted, confidence = prediction.logits.argmax(-1).tolist(), prediction.confidence.tolist()
    with atomic(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for i, row in enumerate(prediction.decisions.rows()):
            line = {"id": ids[i], **row, "tokens": prediction.tokens[i].tolist(), "macs": int(prediction.macs[i])}
            file.write(json.dumps(line | {"pred": predicted[i], "prob": confidence[i]}) + "\n")


def concatenated(predictions: Sequence[Prediction]) -> Prediction:
    """Several batches as one."""
    from prance.adaptive import joined

    outcome = joined([prediction.outcome for prediction in predictions])
    return Prediction(
        outcome.logits,
        outcome.decision,
        torch.cat([p.macs for p in predictions]),
        outcome.count,
        outcome.origin,
        torch.cat([p.parameters for p in predictions]),
        outcome,
    )
