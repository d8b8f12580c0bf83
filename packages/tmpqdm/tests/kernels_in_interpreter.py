"""Run by test_gpu_tasks with TRITON_INTERPRET=1: the Triton kernel against the CPU's operations."""

import torch
from tmpqdm.kernels import fake_quantise
from tmpqdm.quantisers import Step

torch.manual_seed(0)
for shape in ((3, 5, 4, 4), (2, 3), (1,), (0, 4)):
    x = torch.randn(shape) * 2
    if x.numel() > 3:
        x.view(-1)[1] = float("nan")
        x.view(-1)[2] = 0.5 * 0.0625  # exactly between two codes
    for bits, symmetric, zero in ((8, False, 100.0), (4, True, 0.0), (3, False, 2.0)):
        step = Step(torch.tensor(0.0625), torch.tensor(zero), bits, symmetric)
        given = [x, x.bfloat16()]
        if x.ndim == 4:
            given += [x.contiguous(memory_format=torch.channels_last), x[:, 1:3]]
        for values in given:
            found = fake_quantise(values, step.delta, step.low, step.high)
            assert found.dtype == values.dtype and found.shape == values.shape
            assert torch.equal(found.nan_to_num(9), step(values).nan_to_num(9)), (shape, bits, symmetric)
