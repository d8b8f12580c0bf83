"""Checkpoints in the original DiT naming -> diffusers, with the original arithmetic.

Two differences between the two codes matter: the original timestep embedding has frequency shift 0 (diffusers 1), and
its norms use 1e-6. The shift is kept in the model's configuration so that saving and loading preserve it.
"""

import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from papercore.errors import InputError
from torch import Tensor

from qdit.conditioning import share_embedders
from qdit.weights import read_files

SHIFT_KEY = "timestep_frequency_shift"


def from_original(
    state_dict: Mapping[str, Tensor],
    *,
    num_heads: int,
    patch_size: int,
    input_size: int,
    num_classes: int,
    shared_embedders: bool = False,
) -> DiTTransformer2DModel:
    """The diffusers model that computes what the original DiT with these weights does, float32.

    Width, depth and channels come from the shapes; `pos_embed` (a fixed table) may be absent.

    Args:
        input_size: height and width of the input in (latent) pixels.
        shared_embedders: keep one copy of the timestep and label embedders, as the original does, instead of one a
            block; see `qdit.share_embedders`.

    Raises:
        InputError: a tensor is missing, left over, or has another shape; names it.
    """
    for name, value in (
        ("num_heads", num_heads),
        ("patch_size", patch_size),
        ("input_size", input_size),
        ("num_classes", num_classes),
    ):
        if value < 1:
            raise InputError(name, found=value, expected="at least 1")
    try:
        embedding = state_dict["x_embedder.proj.weight"]
        width, in_channels = embedding.shape[:2]
        out_channels = state_dict["final_layer.linear.weight"].shape[0] // patch_size**2
    except KeyError as error:
        raise InputError("tensor", found=f"no {error.args[0]}", expected="a DiT in the original naming") from error
    depth = 1 + max((int(m[1]) for key in state_dict if (m := re.match(r"blocks\.(\d+)\.", key))), default=-1)
    if width % num_heads:
        raise InputError("num_heads", found=num_heads, expected=f"a divisor of the width {width}")
    model = DiTTransformer2DModel(
        num_attention_heads=num_heads,
        attention_head_dim=width // num_heads,
        in_channels=in_channels,
        out_channels=out_channels,
        num_layers=depth,
        sample_size=input_size,
        patch_size=patch_size,
        num_embeds_ada_norm=num_classes,
        norm_eps=1e-6,
    )
    set_frequency_shift(model, 0)
    renamed: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        for name, tensor in _rename(key, value.float(), depth):
            renamed[name] = tensor
    wanted = model.state_dict()
    for name in sorted(set(wanted) - set(renamed) - {"pos_embed.pos_embed"}):
        raise InputError(f"tensor for {name}", found="nothing", expected=f"shape {tuple(wanted[name].shape)}")
    for name, tensor in renamed.items():
        if name not in wanted or wanted[name].shape != tensor.shape:
            expected = tuple(wanted[name].shape) if name in wanted else "no such tensor"
            raise InputError(f"tensor {name}", found=f"shape {tuple(tensor.shape)}", expected=str(expected))
    model.load_state_dict(renamed, strict=False)
    return (share_embedders(model) if shared_embedders else model).eval()


def read_original(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint in the original naming: `.safetensors`, or `.pt`/`.pth` with nothing but tensors.

    A training checkpoint gives its averaged weights (`ema`), as the original's sampler does.

    Raises:
        InputError: another kind of file, a damaged one, pickled objects, or values that are no tensors.
    """
    values: Any
    if not path.is_file():
        raise InputError("checkpoint", where=path, found="no such file", expected=".safetensors or .pt")
    if path.suffix == ".safetensors":
        values = {name: tensor for name, (tensor, _) in read_files([path]).items()}
    elif path.suffix in (".pt", ".pth"):
        try:
            with warnings.catch_warnings(action="ignore"):  # about pickle protocols; what matters is an error
                values = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise InputError(
                "pickled objects are refused", where=path, expected="tensors only", hint="save them as safetensors"
            ) from error
        except Exception as error:  # a reader of pickles raises whatever damaged bytes lead it to
            raise InputError(
                "damaged checkpoint", where=path, found=str(error), expected="what torch.save wrote"
            ) from error
    else:
        raise InputError("checkpoint", where=path, found=path.suffix or "no suffix", expected=".safetensors or .pt")
    if isinstance(values, dict) and isinstance(values.get("ema"), dict):
        values = values["ema"]
    if not isinstance(values, dict) or not values:
        raise InputError("checkpoint", where=path, found=type(values).__name__, expected="tensors by name")
    for name, value in values.items():
        if not isinstance(value, Tensor) or not isinstance(name, str):
            raise InputError(f"entry {name}", where=path, found=type(value).__name__, expected="a tensor")
        if not torch.isfinite(value).all():
            bad = int((~torch.isfinite(value)).sum())
            raise InputError(f"tensor {name}", where=path, found=f"{bad} values that are not finite", expected="none")
    return values


def set_frequency_shift(model: DiTTransformer2DModel, shift: float) -> None:
    """Sets the frequency shift of every timestep embedding and notes it in the model's configuration."""
    for block in model.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = shift  # pyright: ignore[reportAttributeAccessIssue]
    model.register_to_config(**{SHIFT_KEY: shift})


def _rename(key: str, value: Tensor, depth: int) -> list[tuple[str, Tensor]]:
    """One original tensor under its diffusers names."""
    if key == "pos_embed":
        return []
    for old, new in (
        ("x_embedder.proj.", "pos_embed.proj."),
        ("final_layer.adaLN_modulation.1.", "proj_out_1."),
        ("final_layer.linear.", "proj_out_2."),
    ):
        if key.startswith(old):
            return [(new + key[len(old) :], value)]
    embedders = {
        "t_embedder.mlp.0.": "timestep_embedder.linear_1.",
        "t_embedder.mlp.2.": "timestep_embedder.linear_2.",
        "y_embedder.embedding_table.": "class_embedder.embedding_table.",
    }
    for old, new in embedders.items():
        if key.startswith(old):
            rest = key[len(old) :]
            return [(f"transformer_blocks.{i}.norm1.emb.{new}{rest}", value) for i in range(depth)]
    found = re.fullmatch(r"blocks\.(\d+)\.(.+)\.(weight|bias)", key)
    if found:
        block, layer, kind = f"transformer_blocks.{found[1]}", found[2], found[3]
        if layer == "attn.qkv":
            return [
                (f"{block}.attn1.to_{part}.{kind}", tensor) for part, tensor in zip("qkv", value.chunk(3), strict=True)
            ]
        layers = {
            "attn.proj": "attn1.to_out.0",
            "mlp.fc1": "ff.net.0.proj",
            "mlp.fc2": "ff.net.2",
            "adaLN_modulation.1": "norm1.linear",
        }
        if layer in layers:
            return [(f"{block}.{layers[layer]}.{kind}", value)]
    raise InputError(f"tensor {key}", found="a name that does not exist", expected="a DiT in the original naming")


def fold_channel_spread(model: DiTTransformer2DModel, generator: torch.Generator, sigma: float = 0.7) -> None:
    """Gives a small model the uneven input channels of large DiTs without changing the function it computes.

    Channels of the inputs of `qkv`, of the attention output and of the first MLP layer are scaled by
    s = exp(sigma N(0, 1)): adaLN's shift and (1 + scale) are multiplied by s and the columns of the layer are
    divided by it; the rows of v are multiplied and the columns of the output layer divided.
    """

    def spread(count: int) -> Tensor:
        return torch.exp(sigma * torch.randn(count, generator=generator))

    with torch.no_grad():
        for block in model.transformer_blocks:
            adaln, attention = block.norm1.linear, block.attn1
            width = adaln.out_features // 6
            first_mlp = block.ff.net[0].proj
            # rows of adaLN: shift, scale, gate of the attention, then of the MLP
            for shift, layers in ((0, (attention.to_q, attention.to_k, attention.to_v)), (3, (first_mlp,))):
                s = spread(width)
                for part in (shift, shift + 1):
                    rows = slice(part * width, (part + 1) * width)
                    adaln.weight[rows] *= s[:, None]
                    adaln.bias[rows] *= s
                adaln.bias[(shift + 1) * width : (shift + 2) * width] += s - 1
                for layer in layers:
                    layer.weight /= s
            s = spread(width)
            attention.to_v.weight *= s[:, None]
            attention.to_v.bias *= s
            attention.to_out[0].weight /= s
