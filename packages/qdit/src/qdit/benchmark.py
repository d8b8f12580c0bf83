"""`qdit benchmark`: milliseconds of a linear layer computed in several ways, as ratios to float32.

All ways are measured in one run, in turn and in an order that is reversed every other round, so that a busy moment of
the machine falls on all of them; medians are shown. Integer lines include the quantisation of the activation.
"""

import importlib.metadata
import importlib.util
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from papercore.errors import InputError
from papercore.report import Table
from papercore.rundir import environment, write_json
from torch import Tensor, nn

from qdit.layers import LayerSpec, QuantLinear, integer_wins

COLUMNS = ("layer", "method", "ms", "ratio to float32", "ratio to simulation", "remark")
PLAIN, PEER = "float32", "torchao int8 dynamic"
RIVALS = (PLAIN, "bfloat16", "simulation", PEER)
FEATURES = ("avx2", "avx512_f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_tile", "amx_int8", "amx_bf16")


def benchmark(
    shapes: Sequence[tuple[int, int]],
    tokens: int,
    groups: Sequence[int],
    wbits: int,
    *,
    threads: int = 1,
    repeats: int = 15,
    out: Path | None = None,
) -> dict[str, Any]:
    """The table, and what the machine is.

    Args:
        shapes: (rows, columns) of the layers.
        tokens: rows of the activation.
        groups: group sizes; those above a layer's columns are left out of it.
        threads: for every product.
        repeats: timings of each way.
        out: where the single timings go.

    Raises:
        InputError: a number below 1, bits out of range, no shapes.
    """
    if not shapes:
        raise InputError("--shapes", found="none", expected="at least one, such as 3456x1152")
    given = (("--tokens", tokens), ("--threads", threads), ("--repeats", repeats), ("--groups", min(groups, default=1)))
    for name, value in given:
        if value < 1:
            raise InputError(name, found=value, expected="at least 1")
    if not 2 <= wbits <= 8:
        raise InputError("--wbits", found=wbits, expected="2 to 8")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            times = {
                f"{rows}x{columns}": measure(ways(rows, columns, tokens, groups, wbits), repeats)
                for rows, columns in shapes
            }
    finally:
        torch.set_num_threads(before)
    machine = {
        "processor": {name: bool(value) for name, value in torch.cpu.get_capabilities().items() if name in FEATURES},
        "architecture": platform.machine(),
        "threads": threads,
        "torch": torch.__version__,
        "torchao": installed("torchao"),
    }
    setting = {"tokens": tokens, "wbits": wbits, "repeats": repeats}
    if out is not None:
        versions = environment()
        record = {"setting": setting, "machine": machine, "python": versions.get("python"), "milliseconds": times}
        write_json(out, record)
    title = f"W{wbits}A8 linear layers, {tokens} tokens, {threads} thread{'s' if threads > 1 else ''}"
    rows_of_table = [row for layer, measured in times.items() for row in table_rows(layer, tokens, measured)]
    result: dict[str, Any] = {"setting": setting, "machine": machine, "table": Table(title, COLUMNS, rows_of_table)}
    return result if out is None else result | {"out": out}


def table_rows(layer: str, tokens: int, times: dict[str, list[float]]) -> list[tuple[Any, ...]]:
    """A line for every way: median, ratios, whether it loses, and whether `auto` takes it."""
    medians = {name: statistics.median(values) for name, values in times.items()}
    rows, columns = parse_shape(layer)
    lines = []
    for name, value in medians.items():
        slower = [other for other in RIVALS if other in medians and other != name and value > medians[other]]
        own = name.startswith(("simulation", "integer"))
        remarks = [f"loses to {', '.join(slower)}"] if slower and (own or PLAIN in slower) else []
        if name.startswith("integer"):
            size = columns if name.endswith("row-wise") else int(name.split()[-1])
            taken = integer_wins(torch.empty(tokens, columns), rows, columns, size)
            remarks.append("auto takes it" if taken else "auto simulates")
        simulated = value / medians["simulation"]
        lines.append((layer, name, value, value / medians[PLAIN], simulated, "; ".join(remarks)))
    return lines


def ways(rows: int, columns: int, tokens: int, groups: Sequence[int], wbits: int) -> dict[str, Callable[[], Tensor]]:
    """What is measured, by name."""
    generator = torch.Generator().manual_seed(rows + columns)
    weight = torch.randn(rows, columns, generator=generator)
    x = torch.randn(tokens, columns, generator=generator)
    bias = torch.zeros(rows)
    linear = nn.functional.linear
    half = [value.bfloat16() for value in (x, weight, bias)]
    found: dict[str, Callable[[], Tensor]] = {
        PLAIN: lambda: linear(x, weight, bias),
        "bfloat16": lambda: linear(*half),
    }
    sizes = [size for size in groups if size < columns]
    simulated = quantised_layer(weight, bias, sizes[len(sizes) // 2] if sizes else columns, wbits, "simulate")
    found["simulation"] = lambda: simulated(x)
    for size in sizes:
        layer = quantised_layer(weight, bias, size, wbits, "integer")
        found[f"integer, groups of {size}"] = lambda layer=layer: layer(x)
    whole = quantised_layer(weight, bias, columns, wbits, "integer")
    found["integer, row-wise"] = lambda: whole(x)
    peer = torchao_layer(weight, bias)
    if peer is not None:
        found[PEER] = lambda: peer(x)
    return found


def quantised_layer(weight: Tensor, bias: Tensor, size: int, wbits: int, backend: Any) -> QuantLinear:
    spec = LayerSpec(wbits, 8, size, False, False, "dynamic", "token", "float16")
    layer = QuantLinear(*weight.shape, bias=True, spec=spec)
    layer.round_to_nearest(weight)
    layer.bias = nn.Parameter(bias, requires_grad=False)
    layer.backend = backend
    return layer


def torchao_layer(weight: Tensor, bias: Tensor) -> nn.Module | None:
    """torchao's linear layer with int8 weights by row and int8 activations by token; None without torchao."""
    if installed("torchao") is None:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about its own future, and syntax of its sources
        from torchao.quantization import (  # pyright: ignore[reportMissingImports]
            Int8DynamicActivationInt8WeightConfig,
            quantize_,
        )

        model = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0]))
        model[0].weight, model[0].bias = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())
        quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return model


def measure(ways: dict[str, Callable[[], Tensor]], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of every way; each has run once before, so that what is made at first use exists."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for work in ways.values():
        work()
    for turn in range(repeats):
        for name in list(ways) if turn % 2 == 0 else reversed(ways):
            begun = time.perf_counter()
            ways[name]()
            times[name].append(1e3 * (time.perf_counter() - begun))
    return times


def installed(module: str) -> str | None:
    """The module's version, None where it is absent."""
    if importlib.util.find_spec(module) is None:
        return None
    return importlib.metadata.version(module)


def parse_shape(text: str) -> tuple[int, int]:
    """Rows and columns of "3456x1152".

    Raises:
        InputError: anything else.
    """
    rows, separator, columns = text.partition("x")
    if not separator or not rows.isdecimal() or not columns.isdecimal() or not int(rows) or not int(columns):
        raise InputError("--shapes", found=text, expected="rows x columns, such as 3456x1152")
    return int(rows), int(columns)
