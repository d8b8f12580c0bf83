"""Weights under the names of the published code: the meta-network and the selector.

Its QKV rows are interleaved (q, k, v, q, k, v, ...; rows beyond three times the attention width are never used), its
QKV bias is three contiguous thirds. Files are dictionaries that torch has pickled; they are read with weights only.
"""

import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from papercore.errors import InputError
from torch import Tensor

from prance.supernet import MetaViT

NAMES = {
    "attn_layer_norm": "norm1",
    "ffn_layer_norm": "norm2",
    "attn.proj": "proj",
    "fc1": "fc1",
    "fc2": "fc2",
    "lln": "residual",
}


def converted(state: Mapping[str, Tensor], net: MetaViT) -> dict[str, Tensor]:
    """The published names and layout turned into ours; names that are not known keep theirs."""
    d = net.space.attention
    new: dict[str, Tensor] = {}
    for name, value in state.items():
        match = re.fullmatch(r"blocks\.(\d+)\.(.+)\.(weight|bias)", name)
        if match and match[2] == "attn.qkv":
            if match[3] == "weight" and value.ndim == 2 and len(value) >= 3 * d:
                rows = torch.stack([value[offset : 3 * d : 3] for offset in range(3)])
                new[f"blocks.{match[1]}.qkv_weight"] = rows
            elif value.ndim == 1 and len(value) >= 3 * d:
                new[f"blocks.{match[1]}.qkv_bias"] = value[: 3 * d].view(3, d)
            else:
                new[name] = value
        elif match and match[2] in NAMES:
            if match[2] == "attn.proj" and value.ndim == 2:
                value = value[:, :d]  # columns beyond the attention width are never used
            new[f"blocks.{match[1]}.{NAMES[match[2]]}.{match[3]}"] = value
        else:
            new[name.replace("patch_embed_super.proj", "patch_embed")] = value
    return new


def load_reference(net: MetaViT, source: Path | str | Mapping[str, Tensor], *, ema: bool = False) -> MetaViT:
    """Loads published weights into a network of the same geometry; gives the network.

    Args:
        source: a file (a dictionary with "model" or "model_ema", or the weights themselves) or the weights.
        ema: take the averaged weights of the file.

    Raises:
        InputError: not a file of weights, other keys, or other shapes; nothing is loaded then.
    """
    where = None if isinstance(source, Mapping) else source
    state = converted(source if isinstance(source, Mapping) else read_weights(source, ema=ema), net)
    own = net.state_dict()
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or extra:
        raise InputError(
            "weights of another network",
            where=where,
            found=f"missing {missing[:5]}, unknown {extra[:5]}",
            expected="the keys of the published meta-network",
        )
    wrong = [name for name in own if own[name].shape != state[name].shape]
    if wrong:
        name = wrong[0]
        raise InputError(
            f"shape of {name}", where=where, found=tuple(state[name].shape), expected=tuple(own[name].shape)
        )
    net.load_state_dict(state)
    return net


def read_weights(path: Path | str, *, ema: bool = False) -> dict[str, Tensor]:
    """The tensors of a file that torch has written.

    Raises:
        InputError: no such file, no weights in it, or objects that are not weights.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError("no such file", where=path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise InputError(
            "not a file of weights",
            where=path,
            found=str(error).splitlines()[0],
            expected="tensors that torch has saved",
            hint="a file with other objects in it is refused: they could run code",
        ) from error
    if isinstance(content, dict):
        content = content.get("model_ema" if ema else "model", content)
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise InputError("not a file of weights", where=path, expected="a dictionary of tensors")
    return content
