"""Integer products against the slow reference on random shapes, and how torch sees the operators."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from papercore.errors import InputError
from papercore.kernels import cpu as cpu_kernels
from papercore.kernels import group_gemm, group_linear, pack_weight, prepare_weight, quantize_rows
from papercore.quant import Parameters, group_quantize
from torch import Tensor


def case(seed: int, m: int, n: int, k: int, size: int | None, wbits: int = 8, abits: int = 8, symmetric: bool = False):
    """Activations with channels of very different size, some of one sign; codes of a weight; bias."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=generator) * torch.randn(k, generator=generator).exp()
    x = torch.where(torch.rand(m, 1, generator=generator) < 0.3, x.abs(), x)
    w = torch.randn(n, k, generator=generator) + (seed % 3 - 1)
    quantised = group_quantize(w, wbits, size, symmetric=symmetric)
    return x, quantised, torch.randn(n, generator=generator), group_quantize(x, abits, size, symmetric=symmetric)


def close(found: Tensor, expected: Tensor) -> None:
    assert (found - expected).double().norm() <= 1e-6 * expected.double().norm()


sizes = st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 90), st.floats(0, 1))
options = st.tuples(st.integers(2, 8), st.integers(2, 8), st.booleans())


@given(st.integers(0, 10**6), sizes, options)
@settings(max_examples=60, deadline=None)
def test_any_shape_equals_the_reference(seed, shape, option):
    m, n, k, part = shape
    wbits, abits, symmetric = option
    size = max(1, round(part * k))
    x, weight, bias, rows = case(seed, m, n, k, size, wbits, abits, symmetric)
    expected = group_gemm(*rows, *weight, size, bias, backend="reference")
    q = quantize_rows(x, abits, size, symmetric=symmetric)
    moved = q.codes.to(torch.int16) - (2 ** (abits - 1) if symmetric else 0)
    assert torch.equal(moved, rows[0])
    assert torch.equal(q.scale, rows[1])
    close(group_linear(q, prepare_weight(*weight, size), bias), expected)
    close(group_gemm(*rows, *weight, size, bias, backend="cpu"), expected)
    if wbits <= 4:
        packed = pack_weight(prepare_weight(*weight, size, bits=4), tile=6)
        close(group_linear(q, packed, bias), expected)


@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 9), st.integers(1, 70), st.booleans())
@settings(max_examples=40, deadline=None)
def test_any_codes_and_zero_points_equal_the_reference(seed, m, n, k, signed):
    """Codes that no quantiser chose: extremes everywhere, zero points that fit nothing."""
    generator = torch.Generator().manual_seed(seed)
    size, low = max(1, k // 3), -128 if signed else 0
    groups = -(-k // size)
    qx, qw = (torch.randint(0, 256, (rows, k), generator=generator) + low for rows in (m, n))
    qx[0], qw[0] = 255 + low, 255 + low
    zx, zw = (torch.randint(0, 256, (rows, groups), generator=generator) + low for rows in (m, n))
    sx, sw = (torch.rand(rows, groups, generator=generator) + 0.5 for rows in (m, n))
    expected, sums = group_gemm(qx, sx, zx, qw, sw, zw, size, backend="reference", return_accumulators=True)
    found, exact = group_gemm(qx, sx, zx, qw, sw, zw, size, backend="cpu", return_accumulators=True)
    assert torch.equal(exact, sums)
    scale = float((sums.abs().amax((1, 2)) * sx.amax(0) * sw.amax(0)).sum()) + 1  # sums of both signs may cancel
    for y in (found, group_gemm(qx, sx, zx, qw, sw, zw, size, backend="cpu")):
        assert float((y - expected).abs().max()) <= 1e-6 * scale


def test_results_larger_than_a_tile():
    x, weight, bias, rows = case(1, 300, 700, 100, 48)
    expected = group_gemm(*rows, *weight, 48, bias, backend="reference")
    close(group_linear(quantize_rows(x, 8, 48), prepare_weight(*weight, 48), bias), expected)
    four = group_quantize(torch.linspace(-1, 1, 70000).reshape(700, 100).sin(), 4, 48)
    expected = group_gemm(*rows, *four, 48, bias, backend="reference")
    close(group_linear(quantize_rows(x, 8, 48), pack_weight(prepare_weight(*four, 48, bits=4)), bias), expected)


def test_processors_without_exact_products(monkeypatch):
    x, weight, bias, rows = case(2, 5, 7, 30, 8)
    monkeypatch.setattr(cpu_kernels, "exact_integers", lambda dtype: False)
    expected = group_gemm(*rows, *weight, 8, bias, backend="reference")
    close(group_linear(quantize_rows(x, 8, 8), prepare_weight(*weight, 8), bias), expected)


@pytest.mark.parametrize("shape", [(0, 3, 8), (2, 0, 8), (1, 1, 1)])
def test_empty_and_smallest(shape):
    m, n, k = shape
    weight = group_quantize(torch.linspace(-1, 1, n * k).reshape(n, k), 8, k)
    bias = torch.linspace(-1, 1, n)
    y = group_linear(quantize_rows(torch.zeros(m, k), 8, k), prepare_weight(*weight, k), bias)
    assert torch.equal(y, bias.expand(m, n))  # zeros stay exactly zero


@pytest.mark.parametrize("given", [False, True], ids=["own ranges", "given ranges"])
def test_a_bad_token_spoils_only_itself(given):
    x, weight, bias, rows = case(3, 6, 9, 32, 16)
    x[2, 20] = torch.nan
    parameters = Parameters(rows[1], rows[2]) if given else None
    y = group_linear(quantize_rows(x, 8, 16, parameters=parameters), prepare_weight(*weight, 16), bias)
    assert y[2].isnan().all()
    y[2] = 0
    assert y.isfinite().all()


@pytest.mark.parametrize("wbits", [4, 8])
def test_torch_accepts_the_operators(wbits):
    x, weight, bias, rows = case(4, 5, 6, 20, 8, wbits)
    q, w = quantize_rows(x, 8, 8), prepare_weight(*weight, 8)
    ops = torch.ops.papercore
    torch.library.opcheck(ops.quantize_groups, (x, 8, 8, False))
    torch.library.opcheck(ops.quantize_with, (x, rows[1], rows[2], 8, 8, False))
    rest = (w.scale, w.sums, w.rest, bias, 8)
    torch.library.opcheck(ops.group_linear, (*q, w.codes, *rest))
    if wbits == 4:
        packed = pack_weight(prepare_weight(*weight, 8, bits=4))
        rest = (packed.scale, packed.sums, packed.rest, None, 8)
        torch.library.opcheck(ops.group_linear_packed, (*q, packed.packed, *rest, packed.tile))


class Layer(torch.nn.Module):
    def __init__(self, weight) -> None:
        super().__init__()
        self.prepared = weight

    def forward(self, x: Tensor) -> Tensor:
        return group_linear(quantize_rows(x, 8, 8), self.prepared)


def test_an_exported_program_holds_one_node_each():
    x, weight, _, _ = case(5, 4, 6, 16, 8)
    layer = Layer(prepare_weight(*weight, 8))
    program = torch.export.export(layer, (x,))
    names = [str(node.target) for node in program.graph.nodes if "papercore" in str(node.target)]
    assert names == ["papercore.quantize_groups.default", "papercore.group_linear.default"]
    assert torch.equal(program.module()(x), layer(x))


def test_wrong_input_is_named():
    x, weight, bias, rows = case(6, 3, 4, 16, 8)
    q, w = quantize_rows(x, 8, 8), prepare_weight(*weight, 8)
    wrong = [
        (lambda: quantize_rows(x, 9, 8), "bits: found 9"),
        (lambda: quantize_rows(x[0], 8, 8), "x: found shape"),
        (lambda: quantize_rows(x, 8, 17), "group size: found 17"),
        (lambda: quantize_rows(x, 8, 8, parameters=Parameters(rows[1][:2], rows[2])), "scale: found shape"),
        (lambda: group_linear(q, prepare_weight(weight[0][:, :8], weight[1][:, :1], weight[2][:, :1], 8)), "x: found"),
        (lambda: group_linear(q._replace(codes=q.codes.long()), w), "x: found torch.int64"),
        (lambda: group_linear(q._replace(zero=q.zero[:, :1]), w), "zero: found shape"),
        (lambda: group_linear(q, w, bias[:2]), "bias: found shape"),
        (lambda: prepare_weight(weight[0], weight[1][:, :1], weight[2], 8), "scale: found shape"),
        (lambda: prepare_weight(weight[0] * 3, weight[1], weight[2], 8), "codes: found"),
        (lambda: prepare_weight(weight[0][0], weight[1], weight[2], 8), "codes: found shape"),
        (lambda: prepare_weight(torch.zeros(1, 40000), torch.ones(1, 1), torch.zeros(1, 1), None), "overflow"),
        (lambda: pack_weight(prepare_weight(torch.full((2, 8), 99), *[torch.zeros(2, 1)] * 2, 8)), "codes: found"),
        (lambda: pack_weight(prepare_weight(torch.zeros(2, 8), *[torch.zeros(2, 1)] * 2, 8), tile=3), "tile: found 3"),
        (lambda: group_gemm(*rows, *weight, 8, bias, backend="magic"), "backend: found magic"),
        (lambda: group_gemm(*rows, *weight, 8, bias[:1]), "bias: found shape"),
    ]
    if "TRITON_INTERPRET" not in os.environ:
        wrong.append((lambda: group_gemm(*rows, *weight, 8, bias, backend="triton"), "backend: found"))
    for work, message in wrong:
        with pytest.raises(InputError, match=message):
            work()


def test_a_prepared_weight_can_be_copied():
    x, weight, bias, _ = case(7, 3, 4, 16, 8)
    q, w = quantize_rows(x, 8, 8), prepare_weight(*weight, 8)
    assert torch.equal(group_linear(q, copy.deepcopy(w), bias), group_linear(q, w, bias))


def test_triton_kernels_in_the_interpreter():
    """In a process of its own: Triton decides when it is imported whether it interprets."""
    pytest.importorskip("triton")
    script = Path(__file__).with_name("triton_in_interpreter.py")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "all equal" in done.stdout


def test_triton_is_imported_only_when_used():
    code = "import sys, papercore.kernels; assert 'papercore.kernels.triton_kernels' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
