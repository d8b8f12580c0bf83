"""Against numbers computed with the original authors' code (see golden/README.md)."""

import json
from pathlib import Path

import numpy as np
import pytest
import qdit
import torch
from qdit.layers import LayerSpec, QuantLinear

GOLDEN = Path(__file__).parent / "golden"


def load(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{name}.npz") as archive:
        return dict(archive)


GPTQ, TINY, DIGITS = load("gptq_a"), load("tiny_dit_a"), load("digits_dit_a")
GPTQ_CASES = json.loads(str(GPTQ["meta"]))
TINY_META = json.loads(str(TINY["meta"]))


def tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.asarray(array))


@pytest.mark.parametrize("case", GPTQ_CASES, ids=lambda c: str(c["case"]))
def test_gptq(case):
    i = case["case"]
    weight, x = tensor(GPTQ[f"W{i}"]), tensor(GPTQ[f"X{i}"])
    hessian = qdit.Hessian(weight.shape[1])
    for half in x.chunk(2):
        hessian.add(half)
    result = qdit.gptq(
        weight, hessian, case["bits"], case["group_size"], symmetric=case["symmetric"], percdamp=case["percdamp"]
    )
    assert result.dead_columns == len(case["dead_columns"])
    codes, expected = result.codes, tensor(GPTQ[f"fresh64_q{i}"])
    assert (codes != expected).float().mean() <= 0.005
    assert (codes - expected).abs().max() <= 1
    alive = torch.ones(weight.shape[1], dtype=torch.bool)
    alive[case["dead_columns"]] = False

    def output_error(values):
        return float((x.double() @ (weight - values).double().T).square().sum())

    assert output_error(result.dequantize()) == pytest.approx(case["out_err_fresh64"], rel=0.01)
    if not case["reference_scale_is_stale"]:
        assert output_error(result.dequantize()) == pytest.approx(case["out_err_reference"], rel=0.01)
        step = result.scale.repeat_interleave(case["group_size"], -1)[:, : weight.shape[1]]
        off = ((result.dequantize() - tensor(GPTQ[f"reference_dq{i}"])).abs() > 1e-5 + 0.5 * step)[:, alive]
        assert off.float().mean() <= 0.005
    assert result.loss > 0


def tiny_dit() -> torch.nn.Module:
    return qdit.from_original(
        {key[3:]: tensor(value) for key, value in TINY.items() if key.startswith("sd/")},
        num_heads=TINY_META["heads"],
        patch_size=TINY_META["patch"],
        input_size=TINY_META["input_size"],
        num_classes=TINY_META["num_classes"],
    )


def output(model, x, t, y):
    with torch.no_grad():
        return model(x, timestep=t, class_labels=y).sample


def close(found: torch.Tensor, expected: np.ndarray, tolerance: float) -> bool:
    wanted = tensor(expected)
    return bool((found - wanted).abs().max() <= tolerance * wanted.abs().max())


def test_the_imported_model_is_the_original():
    inputs = tuple(tensor(TINY[key]) for key in ("x", "t", "y"))
    assert close(output(tiny_dit(), *inputs), TINY["out_fp"], 2e-5)


@pytest.mark.parametrize("case", TINY_META["cases"], ids=lambda c: str(c["case"]))
@pytest.mark.parametrize("backend", ["simulate", "integer"])
def test_quantised_models(case, backend):
    config = qdit.QDiTConfig(
        wbits=case["wbits"],
        abits=case["abits"],
        group_size=tuple(case["group_sizes"]),
        w_sym=case["w_sym"],
        a_sym=case["a_sym"],
        gptq=False,
        scale_dtype="float32",
    )
    model = qdit.quantize(tiny_dit(), config, backend=backend)
    inputs = tuple(tensor(TINY[key]) for key in ("x", "t", "y"))
    assert close(output(model, *inputs), TINY[f"out{case['case']}"], 2e-5)


def test_samples():
    model = tiny_dit()
    case = TINY_META["cases"][0]
    quantised = qdit.quantize(
        model, qdit.QDiTConfig(4, 8, tuple(case["group_sizes"]), gptq=False, scale_dtype="float32")
    )
    z, labels = tensor(TINY["z"]), tensor(TINY["sample_labels"])
    for of, key, guidance in (
        (model, "sample_fp_cfg1p5", 1.5),
        (model, "sample_fp_nocfg", None),
        (quantised, "sample_q0_cfg1p5", 1.5),
    ):
        found, expected = qdit.sample(of, z, labels, 10, guidance=guidance), tensor(TINY[key])
        assert (found - expected).norm() / expected.norm() <= 1e-3, key
    for steps in (10, 50, 100):
        assert qdit.respaced_timesteps(1000, steps) == TINY[f"timestep_map_{steps}"].tolist()


def test_a_block():
    """One block on given tokens and conditioning, with the conditioning put in place of its embedding."""
    case = TINY_META["cases"][0]
    x, c = tensor(TINY["block_x"]), tensor(TINY["block_c"])
    model = tiny_dit()
    quantised = qdit.quantize(
        model, qdit.QDiTConfig(4, 8, tuple(case["group_sizes"]), gptq=False, scale_dtype="float32")
    )
    for of, key in ((model, "block_fp"), (quantised, "block0")):
        block = of.transformer_blocks[0]
        block.norm1.emb.forward = lambda *_, **__: c
        with torch.no_grad():
            found = block(x, timestep=torch.zeros(2), class_labels=torch.zeros(2, dtype=torch.long))
        assert close(found, TINY[key], 2e-5)


def digits_dit() -> torch.nn.Module:
    return qdit.from_original(
        {key[3:]: tensor(value) for key, value in DIGITS.items() if key.startswith("sd/")},
        num_heads=4,
        patch_size=2,
        input_size=8,
        num_classes=10,
    )


def test_digits_model_and_samples():
    model = digits_dit()
    inputs = tuple(tensor(DIGITS[key]) for key in ("x", "t", "y"))
    assert close(output(model, *inputs), DIGITS["eps"], 1e-5)
    found = qdit.sample(model, tensor(DIGITS["z"]), tensor(DIGITS["labels"]), 20)
    expected = tensor(DIGITS["sample20"])
    assert (found - expected).norm() / expected.norm() <= 1e-3


@pytest.mark.parametrize(
    ("wbits", "group", "expected"), [(8, 32, 2.29e-4), (4, None, 3.55e-2), (4, 32, 1.70e-2), (4, 16, 7.78e-3)]
)
def test_errors_on_the_digits_model(wbits, group, expected):
    model = digits_dit()
    quantised = qdit.quantize(model, qdit.QDiTConfig(wbits, 8, group, gptq=False))
    inputs = qdit.Calibration(*(tensor(DIGITS[key]) for key in ("x", "t", "y")))
    assert qdit.noise_error(model, quantised, inputs) == pytest.approx(expected, rel=0.05)


def test_a_layer_is_its_formula():
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(6, 10, generator=generator), torch.randn(2, 3, 10, generator=generator)
    layer = QuantLinear(6, 10, bias=False, spec=LayerSpec(4, 8, 4, False, False, "dynamic", "token", "float32"))
    layer.round_to_nearest(weight)
    expected = qdit.fake_quantize(x, 8, 4) @ qdit.fake_quantize(weight, 4, 4).T
    torch.testing.assert_close(layer(x), expected)
    layer.backend = "integer"
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
