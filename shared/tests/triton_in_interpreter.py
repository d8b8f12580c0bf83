"""Run by test_kernels with TRITON_INTERPRET=1: the Triton kernels against the reference, on the CPU at tiny sizes."""

import json
from pathlib import Path

import numpy as np
import torch
from papercore.kernels import group_gemm, pack_weight, prepare_weight, quantize_rows
from papercore.kernels import triton_kernels as kernels
from papercore.kernels.operators import as_int8
from papercore.quant import group_quantize

SHAPES = (
    (5, 12, 100, 32),  # short last group
    (17, 33, 96, None),  # row-wise, more rows and columns than a tile
    (3, 40, 130, 48),  # groups of one and a half pieces
    (20, 70, 64, 16),  # groups smaller than a piece
    (2, 5, 260, 130),
    (1, 1, 1, 1),
)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found - expected).norm() <= 1e-6 * expected.norm(), float((found - expected).norm() / expected.norm())


def random_shapes() -> None:
    generator = torch.Generator().manual_seed(0)
    for m, n, k, group in SHAPES:
        size = group or k
        x = torch.randn(m, k, generator=generator) * torch.randn(k, generator=generator).exp()
        x[0] = x[0].abs()
        w, bias = torch.randn(n, k, generator=generator), torch.randn(n, generator=generator)
        for wbits, abits, symmetric in ((8, 8, False), (4, 8, False), (4, 5, False), (8, 8, True), (3, 8, True)):
            codes, scale, zero = kernels.quantize_groups(x, abits, size, symmetric)
            q = quantize_rows(x, abits, size, symmetric=symmetric)
            here, moved = as_int8(q.codes, q.zero)
            assert torch.equal(codes, here)
            assert torch.equal(scale, q.scale)
            assert torch.equal(zero, moved)
            weight = group_quantize(w, wbits, group, symmetric=symmetric)
            expected = group_gemm(codes, scale, zero, *weight, group, bias, backend="reference")
            p = prepare_weight(*weight, group)
            arguments = (p.scale, p.sums, p.rest, bias, size)
            close(kernels.group_linear(codes, scale, zero, p.codes, *arguments, tile=(16, 32)), expected)
            if wbits <= 4:
                p = pack_weight(prepare_weight(*weight, group, bits=4), tile=32)
                arguments = (p.scale, p.sums, p.rest, bias, size, p.tile)
                close(kernels.group_linear_packed(codes, scale, zero, p.packed, *arguments, rows=16), expected)


def bad_tokens() -> None:
    x = torch.randn(4, 40, generator=torch.Generator().manual_seed(1))
    x[1, 3] = torch.nan
    codes, scale, zero = kernels.quantize_groups(x, 8, 16, False)
    p = prepare_weight(*group_quantize(torch.linspace(-1, 1, 240).reshape(6, 40), 8, 16), 16)
    y = kernels.group_linear(codes, scale, zero, p.codes, p.scale, p.sums, p.rest, None, 16, tile=(16, 16))
    assert y[1].isnan().all()
    y[1] = 0
    assert y.isfinite().all()
    empty = kernels.quantize_groups(x[:0], 8, 16, False)
    y = kernels.group_linear(*empty, p.codes, p.scale, p.sums, p.rest, None, 16)
    assert y.shape == (0, 6)


def golden() -> None:
    with np.load(Path(__file__).parent / "golden" / "group_gemm_a.npz") as archive:
        data = dict(archive)
    for case in json.loads(str(data["meta"])):
        i = case["case"]
        names = ("qx", "sx", "zx", "qw", "sw", "zw", "bias")
        qx, sx, zx, qw, sw, zw, bias = (torch.from_numpy(np.asarray(data[f"{name}{i}"])) for name in names)
        size, triton = case["group_size"], {"backend": "triton"}
        y, acc = group_gemm(qx, sx, zx, qw, sw, zw, size, bias, **triton, return_accumulators=True)
        assert torch.equal(acc, torch.from_numpy(data[f"acc{i}"]))
        expected = torch.from_numpy(data[f"y{i}"])
        for found in (y, group_gemm(qx, sx, zx, qw, sw, zw, size, bias, **triton)):
            assert (found.double() - expected).abs().max() <= 1e-6 * expected.abs().max()


if __name__ == "__main__":
    random_shapes()
    bad_tokens()
    golden()
    print("all equal")
