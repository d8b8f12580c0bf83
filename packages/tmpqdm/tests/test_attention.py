"""Quantised attention: golden numbers of the published block, and the processor against diffusers' own."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnAddedKVProcessor, AttnProcessor, AttnProcessor2_0
from papercore.errors import InputError
from tmpqdm.attention import QuantAttention, check_processor
from tmpqdm.quantisers import Step, tensor_parameters

GOLDEN = Path(__file__).parent / "golden"
DATA = np.load(GOLDEN / "attention.npz")
CASES = json.loads((GOLDEN / "attention.json").read_text())


def tensor(name: str) -> torch.Tensor:
    return torch.from_numpy(np.array(DATA[name]))


@torch.no_grad()
def block(case: str) -> Attention:
    """diffusers' attention with the golden block's weights (its 1x1 convolutions are linear layers)."""
    attention = Attention(
        32, heads=1, dim_head=32, bias=True, norm_num_groups=32, eps=1e-6, residual_connection=True,
        _from_deprecated_attn_block=True, upcast_softmax=True,
    )  # fmt: skip
    for name, part in (("q", attention.to_q), ("k", attention.to_k), ("v", attention.to_v),
                       ("proj_out", attention.to_out[0])):  # fmt: skip
        part.weight.copy_(tensor(f"{case}.{name}.weight").flatten(1))
        part.bias.copy_(tensor(f"{case}.{name}.bias"))
    attention.group_norm.weight.copy_(tensor(f"{case}.norm.weight"))
    attention.group_norm.bias.copy_(tensor(f"{case}.norm.bias"))
    return attention.eval()


@torch.no_grad()
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["key"])
def test_block(case):
    name, symmetric = case["case"], case["a_symmetric"]
    attention, processor = block(name), QuantAttention(softmax=True)
    np.testing.assert_allclose(attention(tensor(f"{name}.x_test")), tensor(f"{name}.y_float"), atol=1e-5)
    x = attention.group_norm(tensor(f"{name}.x_calib").flatten(2)).transpose(1, 2)
    for gene, layer in (("q", attention.to_q), ("k", attention.to_k), ("v", attention.to_v)):
        bits = case[f"{gene}_bits"]
        delta, zero = tensor_parameters(layer(x), bits, symmetric=symmetric)
        np.testing.assert_allclose(float(delta), tensor(f"{name}.b{bits}.{gene}delta"), rtol=1e-5)
        processor.steps[gene][bits] = Step(delta, zero, bits, symmetric)
        processor.use(**{gene: bits})
    # the published block keeps its softmax step under the gene's index, at a fixed width
    width, delta = case["softmax_bits"], tensor(f"{name}.b{case['key'].split('w')[-1][0]}.wdelta")
    processor.steps["p"][width] = Step(delta, torch.tensor(0.0), width, symmetric)
    processor.use(p=width)
    attention.set_processor(processor)
    error = (attention(tensor(f"{name}.x_test")) - tensor(case["key"])).abs()
    assert (error <= 1e-4).float().mean() >= 0.99 and float(error.max()) <= 5e-3


@torch.no_grad()
@pytest.mark.parametrize("softmax", [True, False])
@pytest.mark.parametrize("kind", ["cross", "self with mask", "pixels"])
def test_full_precision_equals_diffusers(softmax, kind):
    torch.manual_seed(0)
    if kind == "pixels":
        attention = Attention(
            16, heads=2, dim_head=8, norm_num_groups=4, residual_connection=True, rescale_output_factor=2.0,
            _from_deprecated_attn_block=True,
        ).eval()  # fmt: skip
        arguments = {"hidden_states": torch.randn(3, 16, 4, 4)}
    else:
        cross = 12 if kind == "cross" else None
        attention = Attention(16, cross_attention_dim=cross, heads=4, dim_head=4, qk_norm="layer_norm").eval()
        arguments = {"hidden_states": torch.randn(3, 10, 16)}
        if kind == "cross":
            arguments["encoder_hidden_states"] = torch.randn(3, 7, 12)
        else:
            arguments["attention_mask"] = torch.where(torch.rand(3, 1, 10) > 0.3, 0.0, -1e4)
    expected = attention(**arguments)
    attention.set_processor(QuantAttention(softmax))
    torch.testing.assert_close(attention(**arguments), expected, rtol=1e-5, atol=1e-5)


def test_unknown_processors_are_refused():
    attention = Attention(8, heads=2, dim_head=4)
    for processor in (AttnProcessor(), AttnProcessor2_0()):
        attention.set_processor(processor)
        check_processor("a", attention)
    attention.set_processor(AttnAddedKVProcessor())
    with pytest.raises(InputError, match="attention processor of mid: found AttnAddedKVProcessor"):
        check_processor("mid", attention)
