"""Which linear layers of a model are quantised, under which names, with which settings.

In a diffusion transformer: the four linear layers of every block. Queries, keys and values read the same input and
count as one layer `qkv` (one quantised input, one group size, one product). Left in full precision: patch, timestep
and label embedders, adaLN (unless `adaln_bits`), the final layer, norms, softmax, the two attention products, biases.
In any other model: all linear layers.
"""

import dataclasses
from collections.abc import Sequence

import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from papercore.errors import InputError
from torch import nn

from qdit.config import QDiTConfig, check_group_size, match
from qdit.layers import FusedSelfAttention, LayerSpec, QuantLinear


@dataclasses.dataclass(frozen=True)
class Target:
    """A layer to quantise: one linear module, or the three that make up a `qkv`."""

    name: str
    members: tuple[str, ...]
    rows: int
    columns: int
    bias: bool
    spec: LayerSpec

    @property
    def fused(self) -> bool:
        return len(self.members) > 1


def find_targets(model: nn.Module, config: QDiTConfig) -> list[Target]:
    """The layers that `config` quantises in `model`, in the order of the forward pass.

    Raises:
        InputError: a pattern matches no layer, a layer has no group size, a group size exceeds its layer, the model is
            quantised already, or nothing is left to quantise.
    """
    if isinstance(model, nn.Linear):
        raise InputError("model", found="a single linear layer", expected="a module that contains linear layers")
    if config.wbits == 16 and config.act == "none" and config.adaln_bits is None:
        raise InputError("fields wbits and act", found="16 and none", expected="something to quantise")
    if any(isinstance(module, QuantLinear) for module in model.modules()):
        raise InputError("the model is quantised already", hint="quantise the full-precision model instead")
    candidates = list_layers(model)
    adaln = list_adaln(model) if config.adaln_bits is not None else []
    names = [name for name, _ in candidates + adaln]
    for pattern in config.modules_to_not_convert:
        _require_match(pattern, names, "modules_to_not_convert")
    kept = dict.fromkeys(config.modules_to_not_convert)
    candidates, adaln = ([item for item in items if match(kept, item[0]) is None] for items in (candidates, adaln))
    sizes = _sizes(config, [name for name, _ in candidates], names)
    granularities = config.act_granularity
    if isinstance(granularities, dict):
        for pattern in granularities:
            _require_match(pattern, names, "act_granularity")
    targets = []
    for (name, members), size in zip(candidates, sizes, strict=True):
        linears = [model.get_submodule(member) for member in members]
        rows = sum(linear.out_features for linear in linears)  # pyright: ignore[reportCallIssue, reportArgumentType]
        columns: int = linears[0].in_features  # pyright: ignore[reportAssignmentType]
        if size is not None and size > columns:
            raise InputError(
                f"group size of layer {name}", found=size, expected=f"at most its {columns} columns, or 'row'"
            )
        granularity = granularities
        if isinstance(granularities, dict):
            pattern = match(granularities, name)
            granularity = granularities[pattern] if pattern else "token"
        assert isinstance(granularity, str)
        spec = LayerSpec.of(config, size or columns, granularity)
        targets.append(Target(name, members, rows, columns, linears[0].bias is not None, spec))
    targets += [_adaln_target(model, name, config) for name, _ in adaln]
    if not targets:
        raise InputError("no layer to quantise", expected=f"one of {', '.join(names) or 'no linear layer exists'}")
    return targets


def list_layers(model: nn.Module) -> list[tuple[str, tuple[str, ...]]]:
    """(name, member modules) of every layer that can be quantised."""
    blocks = getattr(model, "transformer_blocks", None)
    prefixes = [f"transformer_blocks.{i}." for i in range(len(blocks))] if isinstance(blocks, nn.ModuleList) else [""]
    found: list[tuple[str, tuple[str, ...]]] = []
    for prefix in prefixes:
        for name, module in model.named_modules(remove_duplicate=False):
            if not name.startswith(prefix) or not isinstance(module, nn.Linear):
                continue
            if prefix and ".norm" in name[len(prefix) - 1 :]:
                continue  # adaLN and its embedders
            parent, _, last = name.rpartition(".")
            if last in ("to_q", "to_k", "to_v") and _is_self_attention(model.get_submodule(parent)):
                if last == "to_q":
                    found.append((f"{parent}.qkv", tuple(f"{parent}.to_{part}" for part in "qkv")))
                continue
            found.append((name, (name,)))
    return found


def list_adaln(model: nn.Module) -> list[tuple[str, tuple[str, ...]]]:
    """(name, member modules) of the adaLN layer of every transformer block."""
    return [
        (name, (name,))
        for name, module in model.named_modules()
        if name.startswith("transformer_blocks.") and name.endswith(".norm1.linear") and isinstance(module, nn.Linear)
    ]


def full_precision_layers(model: nn.Module) -> list[str]:
    """Names of the modules with floating-point matrices or convolutions that are left."""
    kinds = (nn.Linear, nn.Conv2d, nn.Embedding)
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]


def install(model: nn.Module, target: Target) -> QuantLinear:
    """Puts an empty quantised layer into the place of `target`'s modules and gives it."""
    layer = QuantLinear(target.rows, target.columns, bias=target.bias, spec=target.spec, name=target.name)
    parent_name, _, last = target.name.rpartition(".")
    parent = model.get_submodule(parent_name)
    if target.fused:
        for member in target.members:
            delattr(parent, member.rpartition(".")[2])
        parent.set_processor(FusedSelfAttention())  # pyright: ignore[reportCallIssue]
    setattr(parent, last, layer)
    return layer


def uninstall(
    model: nn.Module, name: str, members: tuple[str, ...], weight: torch.Tensor, bias: torch.Tensor | None
) -> None:
    """Puts linear layers of the given weight [N, K] and bias [N] into the place of the quantised layer `name`."""
    parent_name, _, last = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    if len(members) > 1:
        delattr(parent, last)
        parent.set_processor(AttnProcessor2_0())  # pyright: ignore[reportCallIssue]
    biases = bias.chunk(len(members)) if bias is not None else [None] * len(members)
    for member, part, offset in zip(members, weight.chunk(len(members)), biases, strict=True):
        linear = nn.Linear(part.shape[1], part.shape[0], bias=offset is not None, device=part.device)
        linear.weight.data = part.detach().clone()
        if offset is not None:
            linear.bias.data = offset.detach().clone()
        setattr(parent, member.rpartition(".")[2], linear)


def full_weight(model: nn.Module, target: Target) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The weight [N, K] and bias [N] of a target, float32, rows in the order of its members.

    Raises:
        InputError: a value that is not finite; names the tensor and the count.
    """
    weights, biases = [], []
    for member in target.members:
        linear = model.get_submodule(member)
        for kind, kept in (("weight", weights), ("bias", biases)):
            tensor = getattr(linear, kind)
            if tensor is None:
                continue
            bad = int((~torch.isfinite(tensor)).sum())
            if bad:
                raise InputError(f"tensor {member}.{kind}", found=f"{bad} values that are not finite", expected="none")
            kept.append(tensor.detach().float())
    return torch.cat(weights), torch.cat(biases) if biases else None


def _is_self_attention(module: nn.Module) -> bool:
    parts = [getattr(module, f"to_{part}", None) for part in "qkv"]
    return (
        all(isinstance(part, nn.Linear) for part in parts)
        and not getattr(module, "is_cross_attention", True)
        and hasattr(module, "set_processor")
        and len({part.in_features for part in parts}) == 1  # pyright: ignore[reportOptionalMemberAccess]
        and len({part.bias is None for part in parts}) == 1  # pyright: ignore[reportOptionalMemberAccess]
        and getattr(module, "norm_q", None) is None
    )


def _sizes(config: QDiTConfig, names: Sequence[str], existing: Sequence[str]) -> list[int | None]:
    sizes = config.group_size
    if isinstance(sizes, dict):
        for pattern in sizes:
            _require_match(pattern, existing, "group size")
        chosen = []
        for name in names:
            pattern = match(sizes, name)
            if pattern is None:
                raise InputError(
                    f"group size of layer {name}", found="none", expected="a pattern that matches it, such as '*'"
                )
            chosen.append(sizes[pattern])
        return chosen
    if isinstance(sizes, list | tuple):
        if len(sizes) != len(names):
            raise InputError(
                "list of group sizes", found=f"{len(sizes)} entries", expected=f"{len(names)}, one a layer"
            )
        return list(sizes)
    check_group_size(sizes, "group size")
    return [sizes] * len(names)


def _require_match(pattern: str, names: Sequence[str], field: str) -> None:
    if not any(match({pattern: None}, name) for name in names):
        raise InputError(
            f"{field}: pattern {pattern}", found="no layer of that name", expected=f"one of {', '.join(names)}"
        )


def _adaln_target(model: nn.Module, name: str, config: QDiTConfig) -> Target:
    """An adaLN layer: its weight only, in groups of its own size, of the common one, or of 128."""
    assert config.adaln_bits is not None
    linear = model.get_submodule(name)
    columns: int = linear.in_features  # pyright: ignore[reportAssignmentType]
    size = config.group_size
    if isinstance(size, dict):
        pattern = match(size, name)
        size = size[pattern] if pattern else 128
    elif isinstance(size, list | tuple):
        size = 128
    spec = LayerSpec(
        wbits=config.adaln_bits,
        abits=16,
        group_size=min(size or columns, columns),
        w_sym=config.w_sym,
        a_sym=False,
        act="none",
        act_granularity="token",
        scale_dtype=config.scale_dtype,
    )
    rows: int = linear.out_features  # pyright: ignore[reportAssignmentType]
    return Target(name, (name,), rows, columns, linear.bias is not None, spec)
