"""Errors by layer and timestep, the report's page, and costs from shapes alone."""

import dataclasses
import json
import sys

import pytest
import qdit
import torch
from diffusers import DiTTransformer2DModel
from papercore.errors import InputError
from qdit.cli import main
from qdit.config import QDiTConfig
from qdit.diagnose import diagnose, layer_errors
from qdit.pipeline import WEIGHTS, save_pretrained

PLAIN = QDiTConfig(4, 8, 8, gptq=False)


def command(*arguments: object) -> int:
    sys.argv = ["qdit", *map(str, arguments)]
    return main()


@torch.no_grad()
def test_a_layers_error_is_its_own(model, inputs):
    quantised = qdit.quantize(model, PLAIN)
    errors = layer_errors(model, quantised, inputs, buckets=4)
    assert errors.layers == [target.name for target in quantised.qdit_targets]
    assert errors.buckets == [(0, 249), (250, 499), (500, 749), (750, 999)]
    # by hand: the first layer, the first bucket
    seen = []
    handle = model.transformer_blocks[0].attn1.to_q.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    inputs.run(model, inputs)
    handle.remove()
    x = seen[0][inputs.t < 250]
    linear = model.transformer_blocks[0].attn1
    plain = torch.cat([getattr(linear, f"to_{part}")(x) for part in "qkv"], -1)
    found = quantised.transformer_blocks[0].attn1.qkv(x)
    assert float(errors.values[0, 0]) == pytest.approx(
        float((found - plain).square().sum() / plain.square().sum()), rel=1e-4
    )
    better = layer_errors(model, qdit.quantize(model, dataclasses.replace(PLAIN, wbits=8)), inputs, buckets=4)
    assert (better.values < errors.values).all()
    some = dataclasses.replace(inputs, t=torch.full_like(inputs.t, 999))
    assert layer_errors(model, quantised, some, buckets=4).values[:, :3].isnan().all()
    for wrong in (model, qdit.quantize(DiTTransformer2DModel(**small_config(model, 16)).eval(), PLAIN)):
        with pytest.raises(InputError):
            layer_errors(model, wrong, inputs)


@torch.no_grad()
def test_ranges_and_errors_of_the_inputs(model, inputs):
    """By hand for the last layer of a block, whose inputs come from GELU and are one-sided."""
    seen = []
    handle = model.transformer_blocks[1].ff.net[2].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    inputs.run(model, inputs)
    handle.remove()
    errors = layer_errors(model, qdit.quantize(model, dataclasses.replace(PLAIN, abits=4)), inputs, buckets=2)
    index = errors.layers.index("transformer_blocks.1.ff.net.2")
    x = seen[0]
    for bucket, chosen in enumerate((inputs.t < 500, inputs.t >= 500)):
        assert float(errors.largest[index, bucket]) == pytest.approx(float(x[chosen].abs().max()))
    for kind, symmetric in enumerate((False, True)):
        change = (qdit.fake_quantize(x, 4, 8, symmetric=symmetric) - x).square().sum() / x.square().sum()
        assert float(errors.inputs[index, kind]) == pytest.approx(float(change), rel=1e-5)
    assert errors.inputs[index, 0] < errors.inputs[index, 1]
    left = layer_errors(model, qdit.quantize(model, dataclasses.replace(PLAIN, act="none")), inputs, buckets=2)
    assert left.inputs.isnan().all()


def test_inputs_that_float16_cannot_hold_are_reported(model, inputs):
    quantised = qdit.quantize(model, PLAIN)
    assert diagnose(model, quantised, inputs, steps=1, guidance=None, seed=0)[0]["above_float16"] == []
    with torch.no_grad():
        model.transformer_blocks[1].ff.net[0].proj.bias[3] = 70_000
    result, sections = diagnose(model, quantised, inputs, steps=1, guidance=None, seed=0)
    assert result["above_float16"] == ["transformer_blocks.1.ff.net.2"]
    assert "65504" in sections[0].text


def small_config(model, head: int) -> dict:
    config = {key: value for key, value in dict(model.config).items() if not key.startswith("_")}
    return config | {"attention_head_dim": head}


def test_the_page_and_the_command(model, inputs, tmp_path, capsys):
    quantised = qdit.quantize(model, PLAIN)
    result, sections = diagnose(model, quantised, inputs, steps=2, guidance=None, seed=0)
    assert result["noise_error"] == pytest.approx(qdit.noise_error(model, quantised, inputs))
    assert len(sections[0].pictures) == 4
    save_pretrained(model, tmp_path / "full")
    save_pretrained(quantised, tmp_path / "packed")
    inputs.save(tmp_path / "c")
    report = ("report", tmp_path / "full", tmp_path / "packed", "--calibration", tmp_path / "c", "--steps", 2)
    assert command(*report, "--out", tmp_path / "page", "--device", "cpu", "--json") == 0
    assert len(json.loads(capsys.readouterr().out)["layers"]) == 8
    assert (tmp_path / "page" / "report.html").read_text().count("data:image/png") == 4
    assert (
        command(
            "report", tmp_path / "full", tmp_path / "full", "--out", tmp_path / "p", "--calibration", tmp_path / "c"
        )
        == 2
    )
    assert "no quantised layer" in capsys.readouterr().err


def test_costs_from_shapes_are_what_is_written(model, tmp_path):
    for config in (PLAIN, dataclasses.replace(PLAIN, wbits=3, w_sym=True, group_size=7, adaln_bits=4)):
        cost = qdit.model_cost(model, config, rest_bits=32)
        save_pretrained(qdit.quantize(model, config), tmp_path)
        path = tmp_path / WEIGHTS
        with path.open("rb") as file:
            header = 8 + int.from_bytes(file.read(8), "little")
        assert cost.stored_bytes == path.stat().st_size - header


def test_costs_of_the_large_model(tmp_path, capsys):
    """DiT-XL/2 from its configuration alone: the specification's counts."""
    config = {"_class_name": "DiTTransformer2DModel", "num_attention_heads": 16, "attention_head_dim": 72}
    config |= {"in_channels": 4, "out_channels": 8, "num_layers": 28, "sample_size": 32, "patch_size": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert command("estimate", tmp_path, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["quantised_weights"] == 28 * 15_925_248
    assert found["bits_per_weight"] == pytest.approx(4.15625)
    assert found["rescales_per_token"] == 3_483_648
    assert command("estimate", tmp_path / "config.json", "--wbits", 4, "--group-size", "row", "--adaln-bits", 4) == 0
    capsys.readouterr()
    for arguments, words in (
        ((tmp_path / "absent",), "cannot be read"),
        ((tmp_path, "--group-size", 0), "found 0"),
        ((tmp_path, "--rest-bits", 8), "--rest-bits"),
    ):
        assert command("estimate", *arguments) == 2
        assert words in capsys.readouterr().err
