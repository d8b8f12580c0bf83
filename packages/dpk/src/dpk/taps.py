"""Feature taps: found by name or automatically, read with hooks, as maps [B, C, H, W].

Hooks are on the modules only during a call, so that nothing of this stays in a user's network. The activation that
ends a stage may be a module or a function; while the stage runs, torch's function overrides see both.
"""

import dataclasses
import difflib
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from papercore.errors import InputError
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from dpk.method import FeatureInfo, Pair

ACTIVATIONS: frozenset[Callable[..., Any]] = frozenset(
    {
        *(torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, functional.relu, functional.relu6),
        *(functional.leaky_relu, functional.elu, functional.silu, functional.gelu, functional.mish),
        *(functional.hardswish, functional.hardtanh),
    }
)


class _Activations(TorchFunctionMode):
    """Keeps the input and output of the activations called while it is active.

    Args:
        only: which call, counted from 0, to keep; none: the last one.
    """

    def __init__(self, only: int | None = None) -> None:
        super().__init__()
        self.only, self.calls = only, -1
        self.input: Tensor | None = None
        self.output: Tensor | None = None
        self.index = -1

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in ACTIVATIONS:
            return func(*args, **kwargs)
        self.calls += 1
        if self.only not in (None, self.calls):
            return func(*args, **kwargs)
        given = args[0] if args else kwargs["input"]
        kept = given.clone()  # it may be overwritten, by this call or the next
        self.input, self.output, self.index = kept, func(*args, **kwargs), self.calls
        return self.output


@dataclasses.dataclass(frozen=True)
class Tap:
    """One module of one network, and how its output becomes a map."""

    info: FeatureInfo
    activation: int | None
    """which call of an activation ends the module; none: its output is taken"""
    grid: tuple[int, int] | None
    """of tokens [B, N, C]; none: the output is a map"""
    channels_last: bool


class Taps:
    """The taps of one network, in order.

    Args:
        network: as given; wrappers of torch's parallel training are looked through.
        names: of modules.
        example: an input, one image or more.
        preactivation: see `Method`.
        grids: height and width of tokens, by tap, where they are no square.
        role: "student" or "teacher", for messages.

    Raises:
        InputError: a name is not found, or its output is no map and no tokens.
    """

    def __init__(
        self,
        network: nn.Module,
        names: Sequence[str],
        example: Tensor,
        *,
        preactivation: bool = True,
        grids: Sequence[tuple[int, int] | None] | None = None,
        role: str = "network",
    ) -> None:
        self.network, self.role = network, role
        inner = unwrap(network)
        for name in names:
            find(inner, name, role)
        probe = Probe(inner, example, watch=set(names) if preactivation else set())
        self.classes, self.pooled, self.classifier = probe.classes, probe.pooled, probe.classifier
        self.taps: list[Tap] = []
        for name, grid in zip(names, grids or [None] * len(names), strict=True):
            if name not in probe.outputs:
                raise InputError(f"tap {name}", where=role, found="not called", expected="a module on the way")
            self.taps.append(describe(inner, name, probe, grid, role))

    @property
    def infos(self) -> list[FeatureInfo]:
        return [tap.info for tap in self.taps]

    @contextmanager
    def capture(self) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        """Fills two lists during the network's call: the maps, one for every tap, and the pooled vector, if any."""
        inner = unwrap(self.network)
        found: dict[int, Tensor] = {}
        maps: list[Tensor] = []
        pooled: list[Tensor] = []
        with ExitStack() as stack:
            for index, tap in enumerate(self.taps):
                module = inner.get_submodule(tap.info.name)
                for handle in hooks(module, tap, index, found):
                    stack.callback(handle.remove)
            if self.classifier is not None:
                head = inner.get_submodule(self.classifier)
                handle = head.register_forward_pre_hook(lambda module, args: pooled.append(args[0]))
                stack.callback(handle.remove)
            yield maps, pooled
        for index, tap in enumerate(self.taps):
            if index not in found:
                raise InputError(f"tap {tap.info.name}", where=self.role, found="not called", expected="a call a step")
            maps.append(found[index])


def hooks(module: nn.Module, tap: Tap, index: int, found: dict[int, Tensor]) -> list[Any]:
    """Registers what one tap needs."""
    if tap.activation is None:

        def take(module: nn.Module, args: Any, output: Tensor) -> None:
            found[index] = as_map(output, tap)

        return [module.register_forward_hook(take)]
    modes: list[_Activations] = []

    def enter(module: nn.Module, args: Any) -> None:
        modes.append(_Activations(tap.activation))
        modes[-1].__enter__()

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        mode = modes.pop()
        mode.__exit__(None, None, None)
        if mode.input is not None:  # absent only when the call itself has failed
            found[index] = as_map(mode.input, tap)

    return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]


def as_map(output: Tensor, tap: Tap) -> Tensor:
    """A module's output as [B, C, H, W]; tokens before the grid (class token, registers) are dropped."""
    if tap.grid is not None:
        height, width = tap.grid
        return output[:, output.shape[1] - height * width :].mT.unflatten(2, tap.grid)
    return output.permute(0, 3, 1, 2) if tap.channels_last else output


class Probe:
    """One call of a network without gradient and in evaluation mode: what every module gave, in order of completion.

    Args:
        watch: modules whose last activation is looked for.
    """

    def __init__(self, network: nn.Module, example: Tensor, watch: set[str]) -> None:
        self.outputs: dict[str, Any] = {}
        self.ends: dict[str, int] = {}
        """for the watched modules whose output is that of an activation: which call it is"""
        linears: list[tuple[str, Tensor, Tensor]] = []
        modes: list[_Activations] = []
        training = {module: module.training for module in network.modules()}

        def enter(module: nn.Module, args: Any) -> None:
            modes.append(_Activations())
            modes[-1].__enter__()

        with ExitStack() as stack:
            for name, module in network.named_modules():
                if name in watch:
                    stack.callback(module.register_forward_pre_hook(enter).remove)

                def leave(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
                    if name in watch:
                        mode = modes.pop()
                        mode.__exit__(None, None, None)
                        if mode.output is not None and mode.output is output:
                            self.ends[name] = mode.index
                    self.outputs.pop(name, None)
                    self.outputs[name] = output
                    if isinstance(module, nn.Linear):
                        linears.append((name, args[0], output))

                stack.callback(module.register_forward_hook(leave).remove)
            network.eval()
            device = next((p.device for p in network.parameters()), example.device)
            try:
                with torch.no_grad():
                    result = network(example.to(device))
            finally:
                for module, mode in training.items():
                    module.training = mode
        self.input = example
        self.result = result
        self.classes = result.shape[1] if isinstance(result, Tensor) and result.ndim == 2 else 0
        heads = [(name, given) for name, given, output in linears if output is result and given.ndim == 2]
        self.classifier = heads[0][0] if heads else None
        self.pooled = heads[0][1].shape[1] if heads else None


def describe(network: nn.Module, name: str, probe: Probe, grid: tuple[int, int] | None, role: str) -> Tap:
    """The tap at `name`, from what the module gave."""
    output = probe.outputs[name]
    if isinstance(output, Tensor) and output.ndim == 4 and grid is None:
        last = channels_last(network, name, output, probe.input)
        _, channels, height, width = output.permute(0, 3, 1, 2).shape if last else output.shape
        return Tap(FeatureInfo(name, channels, height, width), probe.ends.get(name), None, last)
    if isinstance(output, Tensor) and output.ndim == 3:
        tokens = output.shape[1]
        grid = grid or square(tokens, getattr(network, "num_prefix_tokens", None))
        if grid is not None and grid[0] * grid[1] <= tokens:
            return Tap(FeatureInfo(name, output.shape[2], *grid), probe.ends.get(name), grid, False)
    raise InputError(
        f"output of {name}",
        where=role,
        found=f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__,
        expected="[B, C, H, W], or [B, N, C] with a square of tokens or a grid in the pair"
        + (f" of at most {output.shape[1]}" if grid and isinstance(output, Tensor) else ""),
    )


def square(tokens: int, prefix: int | None) -> tuple[int, int] | None:
    """The grid of a square of tokens with `prefix` others before it; unknown: none or one."""
    for extra in (0, 1) if prefix is None else (prefix,):
        side = math.isqrt(max(0, tokens - extra))
        if side and side * side == tokens - extra:
            return side, side
    return None


def channels_last(network: nn.Module, name: str, output: Tensor, example: Tensor) -> bool:
    """Whether a 4-d output is [B, H, W, C]: timm says so of Swin and its like, others show it by the sides."""
    if "NHWC" in str(getattr(network, "output_fmt", "")):
        return not isinstance(network.get_submodule(name), nn.Conv2d | nn.BatchNorm2d)
    _, first, second, third = output.shape
    return not alike((second, third), example) and alike((first, second), example)


def alike(sides: tuple[int, int], example: Tensor) -> bool:
    """Whether a map of these sides has the proportions of the example, up to a pixel of rounding."""
    height, width = example.shape[-2:]
    return abs(sides[0] * width - sides[1] * height) <= max(width, height)


def find(network: nn.Module, name: str, role: str) -> nn.Module:
    """The module of this name.

    Raises:
        InputError: with the closest names, and all names as deep as the one asked for.
    """
    modules = dict(network.named_modules())
    if name and name in modules:
        return modules[name]
    names = [candidate for candidate in modules if candidate]
    depth = name.count(".")
    close = difflib.get_close_matches(name, names, n=3)
    level = [candidate for candidate in names if candidate.count(".") == depth]
    raise InputError(
        f"no module {name!r} in the {role}",
        expected=(f"perhaps {', '.join(close)}; " if close else "") + f"modules of that depth: {', '.join(level)}",
    )


def unwrap(network: nn.Module) -> nn.Module:
    """The network inside DataParallel or DistributedDataParallel."""
    while isinstance(network, nn.DataParallel | nn.parallel.DistributedDataParallel):
        network = network.module
    return network


def stages(network: nn.Module, example: Tensor) -> dict[int, str]:
    """The last module of every resolution: log2 of the stride -> name, from shallow to deep.

    Only what lies on the way counts: modules inside a block (one that gives a map and spans fewer than three
    resolutions) may hold an earlier resolution than the block's. 1 x 1 outputs (pooling, squeeze and excitation) are no
    stages, and resolutions are taken while they shrink.
    """
    inner = unwrap(network)
    probe = Probe(inner, example, set())
    strides = {name: stride_of(inner, name, output, example) for name, output in probe.outputs.items() if name}
    inside: dict[str, set[int]] = {}
    for name, stride in strides.items():
        for parent in parents(name):
            inside.setdefault(parent, set()).update(() if stride is None else (stride,))
    blocks = {
        name
        for name, stride in strides.items()
        if stride is not None and type(inner.get_submodule(name)) is not nn.Sequential and len(inside.get(name, ())) < 3
    }
    found: dict[int, tuple[int, str]] = {}
    for order, (name, stride) in enumerate(strides.items()):
        if stride is not None and not any(parent in blocks for parent in parents(name)):
            found[stride] = order, name
    latest, kept = -1, {}
    for stride, (order, name) in sorted(found.items()):
        if order > latest:
            latest, kept[stride] = order, name
    return kept


def parents(name: str) -> list[str]:
    """The modules that hold this one, without the root."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def stride_of(network: nn.Module, name: str, output: Any, example: Tensor) -> int | None:
    """log2 of a module's stride, None if it gives no map."""
    if not isinstance(output, Tensor):
        return None
    if output.ndim == 4:
        last = channels_last(network, name, output, example)
        height, width = output.shape[1:3] if last else output.shape[2:]
        if not alike((height, width), example):
            return None
    elif output.ndim == 3:
        grid = square(output.shape[1], getattr(network, "num_prefix_tokens", None))
        if grid is None:
            return None
        height, width = grid
    else:
        return None
    sides = example.shape[-2:]
    return round(math.log2(max(1.0, math.sqrt(sides[0] / height * sides[1] / width)))) if height * width > 1 else None


def auto_pairs(
    student: nn.Module, teacher: nn.Module, example: Tensor, count: int | Literal["all"] = "all"
) -> list[Pair]:
    """Stages of equal stride, from shallow to deep; at most `count`, the deepest.

    Raises:
        InputError: no stride is common.
    """
    ours, theirs = stages(student, example), stages(teacher, example)
    common = sorted(ours.keys() & theirs.keys())
    if not common:
        raise InputError(
            "no stages of equal stride",
            found=f"strides {[2**k for k in ours]} of the student, {[2**k for k in theirs]} of the teacher",
            hint="name the pairs",
        )
    return [Pair(ours[k], theirs[k]) for k in (common if count == "all" else common[-count:])]


def single(network: nn.Module, role: str) -> nn.Module:
    """The network to call: DataParallel's replicas would mix up their taps, so its inner one is called instead."""
    if isinstance(network, nn.DataParallel):
        warnings.warn(f"the {role} runs on one device: DataParallel cannot be tapped", stacklevel=3)
        return network.module
    return network
