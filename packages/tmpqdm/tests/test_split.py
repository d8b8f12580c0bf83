"""Split shortcuts: golden numbers of the published layer, and finding the split points."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tmpqdm.layers import QuantLayer
from tmpqdm.quantisers import Step, tensor_parameters
from torch import nn

GOLDEN = Path(__file__).parent / "golden"
DATA = np.load(GOLDEN / "split.npz")
CASES = json.loads((GOLDEN / "split.json").read_text())


def tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(array))


def shortcut(case) -> QuantLayer:
    """The case's layer, calibrated on its inputs."""
    weight, bias = tensor(DATA[f"{case['case']}.weight"]), tensor(DATA[f"{case['case']}.bias"])
    conv = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2:], padding=(weight.shape[-1] - 1) // 2)
    with torch.no_grad():
        conv.weight.copy_(weight)
        conv.bias.copy_(bias)
    layer = QuantLayer(conv, case["split"] or None)
    layer.round_to_nearest(case["w_bits"])
    x = tensor(DATA[f"{case['case']}.x_calib"])
    inputs = (x[:, : layer.split], x[:, layer.split :]) if layer.split else (x,)
    bits, symmetric = case["a_bits"], case["a_symmetric"]
    layer.set_steps(tuple(Step(*tensor_parameters(v, bits, symmetric=symmetric), bits, symmetric) for v in inputs))
    layer.use(w=case["w_bits"], a=bits)
    return layer


@torch.no_grad()
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["key"])
def test_split(case):
    layer = shortcut(case)
    kind = "split" if case["split"] else "nosplit"
    for bits, quantisers, names in (
        (case["w_bits"], layer.halves[case["w_bits"]], ("wdelta", "wzero")),
        (case["a_bits"], layer.step_halves(case["a_bits"]), ("adelta", "azero")),
    ):
        for half, end in zip(quantisers, ("", "1"), strict=False):
            for found, name in zip((half.delta, half.zero), names, strict=True):
                expected = tensor(DATA[f"{case['case']}.{kind}.b{bits}.{name}{end}"]).reshape(found.shape)
                torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-9)
    x, expected = tensor(DATA[f"{case['case']}.x_test"]), tensor(DATA[f"{case['key']}"])
    error = (layer(x) - expected).abs()
    assert (error <= 1e-4).float().mean() >= 0.995
    step = max(float(half.delta) for half in layer.step_halves(case["a_bits"]))
    assert float(error.max()) <= 1e-4 + step * float(layer.weight.abs().max())
    mse = float((layer(x) - tensor(DATA[f"{case['case']}.y_float"])).square().mean())
    assert mse == pytest.approx(case["mse"], rel=1e-3)


def test_splitting_helps_where_the_skip_matters():
    pairs: dict[tuple[int, int], dict[bool, float]] = {}
    for case in CASES:
        if case["case"] == "skip_matters":
            pairs.setdefault((case["w_bits"], case["a_bits"]), {})[bool(case["split"])] = case["mse"]
    compared = [errors[False] / errors[True] for errors in pairs.values() if len(errors) == 2]
    assert compared and all(1.5 < ratio < 18 for ratio in compared)
