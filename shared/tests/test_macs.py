"""Counted MACs against counts by hand, torch's own counter, and known networks."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from papercore.errors import InputError
from papercore.quant.macs import bitops, trace
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


class Explicit(nn.Module):
    """Attention with its two products written out."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(8, 8)
        self.qkv = nn.Linear(8, 24)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return torch.bmm((q @ k.transpose(1, 2)).softmax(-1), v)


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x):
        q, k, v = (part[:, None] for part in self.qkv(x).chunk(3, -1))
        return nn.functional.scaled_dot_product_attention(q, k, value=v[..., :4])


def test_products_of_attention_are_found():
    found = trace(Explicit(), torch.randn(2, 5, 8))
    assert [(o.name, o.kind, o.macs, o.calls) for o in found.operations] == [
        ("", "qk", 5 * 5 * 8, 1),
        ("", "sv", 5 * 5 * 8, 1),
        ("qkv", "linear", 5 * 8 * 24, 1),
    ]
    assert found.unused == ("unused",)
    fused = trace(Fused(), torch.randn(2, 5, 8))
    assert [(o.kind, o.macs) for o in fused.operations] == [("qk", 200), ("sv", 100), ("linear", 960)]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_convolutions_of_every_kind_equal_torchs_count(device):
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1, stride=2),
        nn.Conv2d(8, 8, 3, groups=8, dilation=2),
        nn.ConvTranspose2d(8, 6, 3, stride=2, groups=2),
        nn.Flatten(2),
        nn.Conv1d(6, 4, 3, bias=False),
        nn.Linear(79, 5),
    ).to(device)
    x = torch.zeros(3, 4, 16, 12, device=device)
    size = model[:5](x).shape[-1]
    model[5] = nn.Linear(size, 5, device=device)
    with FlopCounterMode(display=False) as counter:
        model(x)
    assert trace(model, x).macs * 2 * 3 == counter.get_total_flops()


def test_layers_called_twice_are_summed_and_the_mode_is_kept():
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.Dropout(), layer)
    model[1].eval()
    found = trace(model, torch.randn(1, 4))
    assert [(o.name, o.macs, o.calls, o.weight_shape) for o in found.operations] == [("0", 32, 2, (4, 4))]
    assert (model.training, model[1].training) == (True, False)
    assert not layer._forward_hooks


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_repetition_on_the_same_tensors_is_counted_once(device):
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))

        def forward(self, x, condition):
            x = x + self.embed(condition)
            return self.embed(x) + self.embed(condition)

    x, condition = torch.randn(2, 1, 4, device=device)
    found = trace(Twice().to(device), x, condition=condition)
    assert [(o.macs, o.calls) for o in found.operations] == [(32, 2), (32, 2)]


def test_what_is_called_as_a_function_is_named():
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Parameter(torch.zeros(4, 4))

        def forward(self, x):
            return nn.functional.linear(x, self.matrix) @ self.matrix

    found = trace(nn.Sequential(Own()), torch.randn(2, 4))
    assert found.operations == ()
    assert found.uncounted == ("0",)


def test_known_networks():
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        vit, x = timm.create_model("deit_tiny_patch16_224"), torch.zeros(1, 3, 224, 224)
    found = trace(vit, x)
    tokens, width = 197, 192
    block = tokens * (12 * width * width)
    assert sum(o.macs for o in found.operations if o.kind in ("qk", "sv")) == 12 * 2 * tokens**2 * width
    assert sum(o.macs for o in found.operations if o.kind == "linear") == 12 * block + width * 1000
    assert [o.macs for o in found.operations if o.kind == "conv"] == [196 * 768 * 192]


def test_a_failing_forward_leaves_no_hook():
    model = nn.Linear(3, 3)
    with pytest.raises(RuntimeError):
        trace(model, torch.zeros(1, 4))
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_bad_input():
    with pytest.raises(InputError, match="no tensor"):
        trace(nn.Identity(), 3)

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Linear(3, 3)

        def forward(self, x):
            return x + self.table(torch.ones(1, 3))

    with pytest.raises(InputError, match="one sample"):
        trace(Shared(), torch.zeros(2, 3))
    with pytest.raises(InputError, match="2\\^63"):
        bitops(np.array([2**60]), np.array([8]), np.array([8]))


@given(st.lists(st.tuples(st.integers(0, 2**40), *[st.integers(1, 32)] * 4), min_size=1, max_size=6))
def test_bitops_equal_a_loop(rows):
    macs, *bits = (np.array(column) for column in zip(*rows, strict=True))
    population = bitops(macs, np.stack(bits[:2]), np.stack(bits[2:]))
    assert population.tolist() == [
        sum(math.prod(map(int, parts)) for parts in zip(macs, left, right, strict=True))
        for left, right in zip(bits[:2], bits[2:], strict=True)
    ]
    assert int(bitops(macs, bits[0], bits[2])) == population[0]
