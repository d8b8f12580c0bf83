"""Run by test_quantize with TRITON_INTERPRET=1: the Triton kernels against the plain operations, on the CPU."""

import torch
from oneshot_mpq.quantize import _PlainLSQ
from oneshot_mpq.quantize_triton import TritonLSQ


def results(function: type[torch.autograd.Function], x: torch.Tensor, upstream: torch.Tensor, *rest: float):
    x = x.clone().requires_grad_()
    step = torch.tensor(0.375, requires_grad=True)
    y = function.apply(x, step, *rest)
    y.backward(upstream)
    return y.detach(), x.grad, step.grad


if __name__ == "__main__":
    generator = torch.Generator().manual_seed(0)
    for shape, bounds, dtype in (
        ((3, 5, 7, 11), (-8, 7), torch.float32),
        ((70, 70), (0, 3), torch.float32),
        ((4097,), (-128, 127), torch.float32),
        ((2, 6, 5, 5), (0, 255), torch.bfloat16),
        ((1,), (-2, 1), torch.float16),
    ):
        x = torch.randn(shape, generator=generator)
        x.view(-1)[: 4 * (x.numel() > 4)] = torch.tensor([bounds[0] * 0.375, bounds[1] * 0.375, 0.1875, 1e6])[
            : x.numel()
        ]
        upstream = torch.randn(shape, generator=generator)
        x, upstream = x.to(dtype), upstream.to(dtype)
        if x.ndim == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        found, expected = (results(f, x, upstream, *bounds, 0.5) for f in (TritonLSQ, _PlainLSQ))
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])
        torch.testing.assert_close(found[2], expected[2], rtol=1e-5, atol=1e-4)
    print("all equal")
