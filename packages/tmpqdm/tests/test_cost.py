"""BitOps and bytes against the published code's hooks and independent counts."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiTTransformer2DModel, UNet2DConditionModel, UNet2DModel
from papercore.errors import InputError
from tmpqdm.cost import AttentionEntry, CostModel, LayerEntry

GOLDEN = json.loads((Path(__file__).parent / "golden" / "bitops.json").read_text())
CIFAR = {
    "sample_size": 32,
    "in_channels": 3,
    "out_channels": 3,
    "layers_per_block": 2,
    "block_out_channels": (128, 256, 256, 256),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "norm_eps": 1e-6,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "attention_head_dim": None,
}


def uniform(cost: CostModel, bits: int) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for name, gene in cost.genes:
        if gene != "p":
            found.setdefault(name, {})[gene] = bits
    return found


@pytest.mark.parametrize("entry", GOLDEN["unet"], ids=lambda e: e["name"])
def test_published_unets(entry):
    layers = tuple(
        LayerEntry(
            op["name"],
            op["macs_per_image"],
            op["weight_numel"],
            op["out_channels"],
            op["bias"],
            2 if op["split"] else 1,
        )
        for op in entry["ops"]
    )
    attentions = tuple(
        AttentionEntry(a["name"], a["qk_macs_per_image"], a["sv_macs_per_image"]) for a in entry["attention"]
    )
    cost = CostModel(layers, attentions, entry["softmax_bits"])
    menu, columns = entry["bits"], []
    for candidate in entry["candidates"]:
        bits = {op["name"]: {g: menu[candidate["genes"][op[f"{g}_gene"]]] for g in "wa"} for op in entry["ops"]}
        bits |= {a["name"]: {g: menu[candidate["genes"][a[f"{g}_gene"]]] for g in "qkv"} for a in entry["attention"]}
        assert cost.bitops(bits) == candidate["bitops_per_image_per_step"]
        assert cost.bitops(bits, [0, 9, 39]) == 3 * candidate["bitops_per_image_per_step"]
        assert cost.bitops([bits, bits], 2, guidance=True) == 4 * candidate["bitops_per_image_per_step"]
        published = cost.bitops(bits, convention="published") / 1e9
        assert published == pytest.approx(candidate["published_giga_bitops_batch2"], rel=1e-9)
        assert sum(layer.weights * bits[layer.name]["w"] for layer in layers) == candidate["weight_bits"]
        assert sum(layer.channels * layer.halves for layer in layers) == candidate["scale_groups"]
        columns.append(cost.column(bits))
    many = cost.bitops_many(np.array(columns))
    assert many.tolist() == [candidate["bitops_per_image_per_step"] for candidate in entry["candidates"]]
    # the same network in diffusers has the same layers, in another order
    traced = CostModel.trace(UNet2DModel(**entry["diffusers_config"]))
    assert sorted(layer.macs for layer in traced.layers) == sorted(layer.macs for layer in layers)
    assert sorted((a.qk, a.sv) for a in traced.attentions) == sorted((a.qk, a.sv) for a in attentions)


@pytest.mark.parametrize("family", GOLDEN["families"], ids=lambda f: f["name"])
def test_families(family):
    if family["name"] == "dit":
        model = DiTTransformer2DModel(**family["config"])
        inputs = (torch.randn(1, 4, 8, 8), torch.tensor([1]), {"class_labels": torch.tensor([1])})
    else:
        model = UNet2DConditionModel(**family["config"])
        inputs = (torch.randn(1, 4, 16, 16), torch.tensor([1]), {"encoder_hidden_states": torch.randn(1, 7, 24)})
    cost = CostModel.trace(model, inputs)
    assert {layer.name: layer.macs for layer in cost.layers} == {
        op["name"]: op["macs_per_image"] for op in family["ops"]
    }
    assert {(a.name, a.qk, a.sv) for a in cost.attentions} == {
        (a["name"], a["qk_macs_per_image"], a["sv_macs_per_image"]) for a in family["attention"]
    }


def test_the_cifar_network_costs_what_is_known():
    with torch.device("meta"):
        model = UNet2DModel(**CIFAR)
        inputs = (torch.zeros(1, 3, 32, 32), torch.zeros(1, dtype=torch.long))
    cost = CostModel.trace(model, inputs)
    assert (len(cost.layers), len(cost.attentions)) == (113, 6)
    assert sum(layer.macs for layer in cost.layers) == 6_053_953_536
    for bits, giga, published in ((8, 398.2, 785.652), (7, 305.5, 602.102), (6, 225.0, 442.937), (5, 156.8, 308.155)):
        assert cost.bitops(uniform(cost, bits)) / 1e9 == pytest.approx(giga, abs=0.06)
        known = cost.bitops(uniform(cost, bits), convention="published") / 1e9
        assert known == pytest.approx(published, abs=6e-4)
    assert cost.full_precision / 1e9 == pytest.approx(6371, abs=1)
    float16 = 2 * sum(p.numel() for p in model.parameters())
    scales = sum(layer.channels for layer in cost.layers)
    assert cost.size_bytes(uniform(cost, 16)) == float16 + 4 * scales


def test_sizes():
    cost = CostModel((LayerEntry("a", 10, 9, 3, 3), LayerEntry("b", 10, 8, 2, 0, 2)), other_parameters=5)
    bits = {"a": {"w": 5, "a": 8}, "b": {"w": 3, "a": 8}}
    # ceil(45 / 8) + ceil(3 * 21 / 8), ceil(24 / 8) + ceil(4 * 19 / 8), biases and the rest in float16
    assert cost.size_bytes(bits) == (6 + 8) + (3 + 10) + 16
    assert cost.read_bytes(bits) == 6 + 3
    more = {"a": {"w": 8, "a": 8}, "b": {"w": 2, "a": 8}}
    assert cost.size_bytes([bits, more]) == (9 + 9) + (3 + 10) + 16
    shares = [row[-1] for row in cost.table(bits).rows]
    assert sum(shares) == pytest.approx(1)


def test_bad_input():
    cost = CostModel((LayerEntry("a", 10, 9, 3),))
    with pytest.raises(InputError, match="bits of a: found no a"):
        cost.bitops({"a": {"w": 4}})
    with pytest.raises(InputError, match="one for each of 3 steps"):
        cost.bitops([{"a": {"w": 4, "a": 4}}], 3)
    with pytest.raises(InputError, match=r"\(population, 2\)"):
        cost.bitops_many(np.zeros((2, 3), int))
