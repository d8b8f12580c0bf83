"""CKA, masks, ratios and hybrid features equal the stored numbers."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from dpk.alignment import MinibatchCKA, cka
from dpk.integrator import TransformerIntegrator, stitch, unpatchify
from dpk.method import FeatureInfo
from dpk.prior import pixel_mask, prior_mask, ratio, smooth
from torch import nn

GOLDEN = Path(__file__).with_name("golden")


def cases(name: str) -> list[dict]:
    return json.loads((GOLDEN / f"{name}.json").read_text())


def arrays(name: str) -> dict[str, torch.Tensor]:
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_cka(unbiased, dtype, tolerance):
    key, stored = "unbiased" if unbiased else "biased", arrays("cka_a")
    for case in cases("cka_a"):
        pooled = MinibatchCKA(unbiased)
        for j, expected in enumerate(case["per_minibatch"]):
            x, y = (stored[f"c{case['case']}_{network}{j}"].to(dtype) for network in "st")
            pooled.update(x, y)
            found = float(cka(x, y, unbiased))
            assert found == pytest.approx(expected[key] or 0, abs=tolerance if case["kind"] != "const" else 1e-12)
        assert float(pooled.compute()) == pytest.approx(case[f"minibatch_cka_{key}"] or 0, abs=tolerance)


def test_masks():
    stored = arrays("masks_a")
    for case in cases("masks_a"):
        scores, patch, size = stored[f"c{case['case']}_scores"], case["patch"], tuple(case["hw"])
        grid = (size[0] // patch, size[1] // patch)
        for rho in (1 - case["cka"], ratio(torch.tensor(case["cka"], dtype=torch.float64))):
            mask = prior_mask(scores, rho)
            assert torch.equal(mask, stored[f"c{case['case']}_teacher_mask"])
            assert torch.equal(pixel_mask(mask, grid, size, patch)[:, 0], stored[f"c{case['case']}_pixel_mask"])


def test_ratios():
    case = json.loads((GOLDEN / "ratio_a.json").read_text())
    average = torch.tensor(case["initial"], dtype=torch.float64)
    for step, value in enumerate(torch.tensor(case["cka"], dtype=torch.float64)):
        average = smooth(average, value, case["momentum"])
        assert float(average) == pytest.approx(case["cka_ema"][step], abs=1e-12)
        assert float(ratio(value)) == pytest.approx(case["prior_ratio_instant"][step], abs=1e-12)
        assert float(ratio(average)) == pytest.approx(case["prior_ratio_ema"][step], abs=1e-12)


def test_hybrid_features():
    stored = arrays("hybrid_a")
    for case in cases("hybrid_a"):
        n, patch, size = case["case"], case["patch"], tuple(case["hw"])
        get = {key[3:]: value for key, value in stored.items() if key.startswith(f"c{n}_")}
        info = [FeatureInfo("a", case[f"{network}_channels"], *size) for network in ("student", "teacher")]
        # the stored case has no positions, no blocks and no norm: what is left of the integrator is compared
        integrator = TransformerIntegrator(
            *info, dim=8, heads=1, encoder_depth=0, decoder_depth=0, patch=patch
        ).double()
        integrator.positions = torch.zeros(1, dtype=torch.float64)
        integrator.norm = nn.Identity()
        for layer, weight, bias in (
            (integrator.student_embed, "Ws", "bs"),
            (integrator.teacher_embed, "Wt", "bt"),
            (integrator.output, "Wo", "bo"),
        ):
            layer.weight, layer.bias = nn.Parameter(get[weight]), nn.Parameter(get[bias])
        student = get["student"].clone().requires_grad_()
        tokens = integrator.embed(student, get["teacher"])
        mask = prior_mask(get["scores"], case["prior_ratio"])
        generated = integrator(tokens, mask, size)
        loss = nn.functional.mse_loss(generated, get["teacher"])
        loss.backward()
        assert torch.equal(mask, get["teacher_mask"])
        for found, expected in (
            (tokens[0], "student_tokens"),
            (tokens[1], "teacher_tokens"),
            (stitch(tokens, mask), "hybrid_tokens"),
            (generated, "generated"),
            (student.grad, "grad_student"),
        ):
            torch.testing.assert_close(found, get[expected], rtol=0, atol=1e-10)
        assert loss.item() == pytest.approx(case["loss"], abs=1e-10)
        assert unpatchify(torch.zeros(1, 6, 8), (2, 3), 2, (3, 5)).shape == (1, 2, 3, 5)
