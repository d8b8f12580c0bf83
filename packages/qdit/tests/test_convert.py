"""Quantising models: what is quantised, with which settings, and what must hold for the result."""

import copy
import dataclasses
import warnings

import pytest
import qdit
import torch
from papercore.errors import InputError
from qdit.blockwise import Rounding
from qdit.config import QDiTConfig, read_plan
from qdit.convert import collect_hessians
from qdit.layers import LayerSpec, QuantLinear
from qdit.original import fold_channel_spread
from qdit.pipeline import report
from qdit.targets import find_targets, full_precision_layers
from torch import nn

PLAIN = QDiTConfig(wbits=4, abits=8, group_size=8, gptq=False)
BLOCK = ("attn1.qkv", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2")
NAMES = [f"transformer_blocks.{i}.{name}" for i in range(2) for name in BLOCK]


def test_the_four_layers_of_every_block_are_quantised_and_nothing_else(model):
    quantised = qdit.quantize(model, PLAIN)
    assert [target.name for target in quantised.qdit_targets] == NAMES
    left = full_precision_layers(quantised)
    assert "transformer_blocks.0.norm1.linear" in left
    assert "proj_out_2" in left
    assert not any(name.startswith("transformer_blocks.0.attn1") for name in left)
    assert all(isinstance(module, nn.Linear) for name, module in model.named_modules() if name.endswith("to_q"))
    text = report(quantised)
    assert text["full_precision"] == left
    # width 24: groups of 8 divide; MLP 96 too
    assert text["bits_per_weight"] == pytest.approx(4 + (16 + 4) / 8)


def test_the_copy_leaves_the_model_alone(model, inputs):
    before = inputs.run(model, inputs)
    quantised = qdit.quantize(model, PLAIN)
    assert torch.equal(inputs.run(model, inputs), before)
    assert not torch.equal(inputs.run(quantised, inputs), before)
    same = qdit.quantize(model, PLAIN, inplace=True)
    assert same is model
    assert torch.equal(inputs.run(model, inputs), inputs.run(quantised, inputs))


@pytest.mark.parametrize("w_sym", [False, True])
@pytest.mark.parametrize("a_sym", [False, True])
@pytest.mark.parametrize("group", [None, 8, 7])
def test_integer_layers_give_what_the_simulation_gives(model, inputs, w_sym, a_sym, group):
    config = dataclasses.replace(PLAIN, w_sym=w_sym, a_sym=a_sym, group_size=group)
    quantised = qdit.quantize(model, config, backend="simulate")
    seen = []
    for name, module in quantised.named_modules():
        if isinstance(module, QuantLinear):
            module.register_forward_hook(lambda layer, args, out, name=name: seen.append((name, layer, args[0], out)))
    inputs.run(quantised, inputs)
    assert len(seen) == len(NAMES)
    for name, layer, x, out in seen:
        layer.backend = "integer"
        assert (layer.forward(x) - out).norm() <= 1e-6 * out.norm(), name


def test_results_do_not_depend_on_the_batch(model, inputs):
    """Token by token ranges, also with padding beside it."""
    quantised = qdit.quantize(model, PLAIN)
    layer = quantised.get_submodule(NAMES[1])
    x = torch.randn(3, 5, 24)
    together = layer(x)
    padded = layer(torch.cat([x, 100 * torch.ones(3, 2, 24)], 1))[:, :5]
    torch.testing.assert_close(together, padded, rtol=1e-6, atol=1e-6)
    for i in range(3):
        torch.testing.assert_close(layer(x[i : i + 1]), together[i : i + 1], rtol=1e-6, atol=1e-6)
    assert layer(x[:0]).shape == (0, 5, 24)
    assert layer(x[0, 0]).shape == (24,)


def test_ranges_over_samples_and_tensors():
    def layer(granularity):
        made = QuantLinear(2, 4, bias=False, spec=LayerSpec(8, 8, 2, False, False, "dynamic", granularity, "float32"))
        made.round_to_nearest(torch.ones(2, 4))
        return made

    x = torch.tensor([[[1.0, 2, -3, 0], [4, 0, 0, 8]], [[-1.0, 0, 0, 0], [0, 0, 0, 16]]])
    scale = layer("token").activation_parameters(x).scale * 255
    torch.testing.assert_close(scale, torch.tensor([[[2.0, 3], [4, 8]], [[1, 1e-5], [1e-5, 16]]]))
    scale = layer("sample").activation_parameters(x).scale * 255
    torch.testing.assert_close(scale, torch.tensor([[[4.0, 11], [4, 11]], [[1, 16], [1, 16]]]))
    scale = layer("tensor").activation_parameters(x).scale * 255
    torch.testing.assert_close(scale, torch.tensor([5.0, 19]).expand(2, 2, 2))


def test_a_bad_token_spoils_only_itself(model):
    layer = qdit.quantize(model, PLAIN).get_submodule(NAMES[0])
    x = torch.randn(2, 3, 24)
    x[0, 1, 5] = torch.nan
    for backend in ("simulate", "integer"):
        layer.backend = backend
        y = layer(x)
        assert y[0, 1].isnan().all()
        y[0, 1] = 0
        assert y.isfinite().all()


def test_copies_keep_type_and_loaded_weights_are_used(model, inputs):
    quantised = qdit.quantize(model, PLAIN)
    layer = quantised.get_submodule(NAMES[0])
    x = torch.randn(2, 3, 24)
    before = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), before)
    assert copy.deepcopy(copy.deepcopy(layer).to(torch.bfloat16)).bias.dtype == torch.bfloat16
    assert copy.deepcopy(copy.deepcopy(layer).to("meta")).bias.device.type == "meta"
    other = qdit.quantize(model, dataclasses.replace(PLAIN, group_size=8, scale_dtype="float16"))
    for module in other.modules():
        if isinstance(module, QuantLinear):
            module.scale.copy_((2 * module.scale.view(torch.float16)).view(torch.int16))
    for backend in ("simulate", "integer"):
        layer.backend = backend
        layer(x)
        layer.load_state_dict(other.get_submodule(NAMES[0]).state_dict())
        assert not torch.allclose(layer(x), before)
        layer.load_state_dict(qdit.quantize(model, PLAIN).get_submodule(NAMES[0]).state_dict())
        torch.testing.assert_close(layer(x), before, rtol=1e-5, atol=1e-6)


def test_training_mode_does_not_change_what_is_measured(model, inputs):
    model.train()
    options = {"samples": 8, "steps": 3, "guidance": 1.5, "null_fraction": 0.5, "seed": 0}
    assert torch.equal(qdit.collect_calibration(model, **options).x, qdit.collect_calibration(model, **options).x)
    assert model.training
    config = dataclasses.replace(PLAIN, gptq=True)
    first, second = (qdit.quantize(model, config, inputs) for _ in range(2))
    assert torch.equal(inputs.run(first, inputs), inputs.run(second, inputs))


def test_static_ranges_come_from_calibration(model, inputs):
    config = dataclasses.replace(PLAIN, act="static", wbits=16)
    with pytest.raises(InputError, match="calibration: found none"):
        qdit.quantize(model, config)
    static = qdit.quantize(model, config, inputs)
    dynamic = qdit.quantize(model, dataclasses.replace(config, act="dynamic"), inputs)
    errors = [qdit.noise_error(model, of, inputs) for of in (static, dynamic)]
    assert 0 < errors[1] < errors[0]
    # the first layer's input is the same in both models: its range is the observer's
    kept = []
    model.get_submodule("transformer_blocks.0.attn1.to_q").register_forward_pre_hook(lambda _, a: kept.append(a[0]))
    observer = qdit.RangeObserver(8, 8)
    for batch in inputs.batches(16):
        inputs.run(model, batch)
        observer.update(kept[-1])
    bad = kept[-1].clone()
    bad[0, 1] = torch.nan
    packed = qdit.quantize(model, dataclasses.replace(config, wbits=4), inputs).get_submodule(NAMES[0])
    for backend in ("simulate", "integer"):
        packed.backend = backend
        assert packed(bad)[0, 1].isnan().all()
        assert packed(bad)[0, 0].isfinite().all()
    layer = static.get_submodule(NAMES[0])
    assert torch.equal(layer.activation_parameters(kept[-1]).scale[0, 0], observer.parameters().scale)


def test_gptq_beats_rounding_and_uses_quantised_inputs(model, inputs):
    fold_channel_spread(model, torch.Generator().manual_seed(0))
    gptq = qdit.quantize(model, dataclasses.replace(PLAIN, gptq=True), inputs)
    nearest = qdit.quantize(model, PLAIN)
    assert qdit.noise_error(model, gptq, inputs) < qdit.noise_error(model, nearest, inputs)
    assert {record.method for record in gptq.qdit_records} == {"gptq"}
    # block by block is what running the whole half-quantised model gives
    target = gptq.qdit_targets[4]
    half = qdit.quantize(model, dataclasses.replace(PLAIN, gptq=True), inputs)
    seen = qdit.Hessian(target.columns)
    layer = half.get_submodule(target.name)
    layer.register_forward_pre_hook(lambda m, a: seen.add(m.quantized_input(a[0])))
    for batch in inputs.batches(16):
        inputs.run(half, batch)
    weight = torch.cat([model.get_submodule(member).weight for member in target.members])
    result = qdit.gptq(weight, seen, 4, 8, scale_dtype=torch.float16)
    assert (layer.codes()[0] != result.codes).float().mean() <= 0.005


def test_gptq_act_order_dead_columns_and_damping():
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(8, 20, generator=generator), torch.randn(40, 20, generator=generator)
    x[:, 3] = 0
    x = x * torch.logspace(-1, 1, 20)
    hessian = qdit.Hessian(20)
    hessian.add(x)
    errors = {}
    for order in (False, True):
        result = qdit.gptq(weight, hessian, 3, 6, act_order=order)
        assert result.dead_columns == 1
        assert (result.dequantize()[:, 3] == 0).all()
        assert result.scale.shape == (8, 4)
        errors[order] = float((x @ (weight - result.dequantize()).T).square().sum())
    rounded = float((x @ (weight - qdit.fake_quantize(weight, 3, 6)).T).square().sum())
    assert max(errors.values()) < 0.9 * rounded
    small = qdit.gptq(weight, hessian, 3, 6, block_size=4)
    large = qdit.gptq(weight, hessian, 3, 6, block_size=128)
    assert (small.codes != large.codes).float().mean() <= 0.02
    singular = qdit.Hessian(20)
    singular.add(torch.ones(2, 20))
    assert qdit.gptq(weight, singular, 3, 6).codes.shape == (8, 20)
    with pytest.raises(ArithmeticError, match="Cholesky"):
        qdit.gptq(weight, -torch.eye(20), 3, 6)
    with pytest.raises(InputError, match="Hessian"):
        qdit.gptq(weight, torch.eye(3), 3, 6)
    with pytest.raises(InputError, match="not finite"):
        hessian.add(torch.full((1, 20), torch.inf))


def test_a_layer_whose_hessian_fails_is_rounded_with_a_warning(model, inputs, monkeypatch):
    import qdit.blockwise
    import qdit.rounding

    def fails(*_, **__):
        raise qdit.rounding.SingularHessianError("no factor")

    monkeypatch.setattr(qdit.blockwise, "gptq", fails)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        quantised = qdit.quantize(model, dataclasses.replace(PLAIN, gptq=True), inputs)
    assert [str(w.message) for w in heard] == [f"layer {name}: no factor; rounded to nearest instead" for name in NAMES]
    assert {record.method for record in quantised.qdit_records} == {"nearest"}
    assert torch.equal(inputs.run(quantised, inputs), inputs.run(qdit.quantize(model, PLAIN), inputs))


def test_order_and_damping_reach_gptq(model, inputs):
    config = dataclasses.replace(PLAIN, gptq=True, act_order=True, percdamp=0.1)
    hessians = collect_hessians(model, config, inputs)
    quantised = qdit.quantize(model, config, inputs)
    name = NAMES[2]
    layer, weight = quantised.get_submodule(name), model.get_submodule(name).weight
    plain = {"group_size": 8, "bits": 4, "scale_dtype": torch.float16}
    alone = qdit.gptq(weight, hessians[name], act_order=True, percdamp=0.1, **plain)
    assert torch.equal(layer.dequantized(), alone.dequantize())
    assert not torch.equal(layer.dequantized(), qdit.gptq(weight, hessians[name], **plain).dequantize())


@pytest.mark.parametrize("kind", ["blocks", "any model"])
def test_an_interrupted_gptq_goes_on_from_the_last_finished_block(model, inputs, tmp_path, monkeypatch, kind):
    config = dataclasses.replace(PLAIN, gptq=True)
    if kind == "any model":
        model.transformer_blocks = nn.Sequential(*model.transformer_blocks)  # one pseudo-block
    whole = qdit.quantize(model, config, inputs)
    names = [target.name for target in whole.qdit_targets]
    rounded = []

    def counting(self, target, hessian, rounding=Rounding.round_one):
        rounded.append(target.name)
        if rounded.count(names[-1]) == 1 and target.name == names[-1]:
            raise KeyboardInterrupt
        return rounding(self, target, hessian)

    monkeypatch.setattr(Rounding, "round_one", counting)
    with pytest.raises(KeyboardInterrupt):
        qdit.quantize(model, config, inputs, progress=tmp_path)
    rounded[:] = [names[-1]]
    again = qdit.quantize(model, config, inputs, progress=tmp_path)
    assert rounded[1:] == (names[4:] if kind == "blocks" else names)
    assert again.qdit_records == whole.qdit_records
    assert torch.equal(inputs.run(again, inputs), inputs.run(whole, inputs))
    for name, value in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    # all blocks are there now; a damaged one, or those of another run, are done again
    files = sorted(tmp_path.iterdir())
    files[-1].write_bytes(files[-1].read_bytes()[:100])
    rounded[:] = [names[-1]]
    qdit.quantize(model, config, inputs, progress=tmp_path)
    assert rounded[1:] == (names[4:] if kind == "blocks" else names)
    rounded[:] = [names[-1]]
    qdit.quantize(model, dataclasses.replace(config, percdamp=0.02), inputs, progress=tmp_path)
    assert rounded[1:] == names


def test_inputs_that_are_not_finite_are_named_when_asked(model, inputs):
    layer = NAMES[3]
    for backend in ("simulate", "integer"):
        quantised = qdit.quantize(model, PLAIN, backend=backend)
        x = torch.randn(2, 3, 96)
        x[0, 1, 5] = torch.nan
        y = quantised.get_submodule(layer)(x)
        assert y.isnan().any(-1).tolist() == [[False, True, False], [False, False, False]]
        checking = qdit.quantize(model, PLAIN, backend=backend, check_finite=True)
        assert torch.equal(inputs.run(checking, inputs), inputs.run(quantised, inputs))
        with pytest.raises(InputError, match=rf"layer {layer}: found 1 values that are not finite"):
            checking.get_submodule(layer)(x)
        with pytest.raises(InputError, match="65504"):
            checking.get_submodule(layer)((x.nan_to_num(0) * 1e6).half())
    wrong = dataclasses.replace(inputs, x=inputs.x * torch.inf)
    with pytest.raises(InputError, match=rf"layer {NAMES[0]}: calibration input: .*not finite"):
        qdit.quantize(model, dataclasses.replace(PLAIN, gptq=True), wrong)


def test_sizes_by_pattern_list_and_row(model):
    config = dataclasses.replace(PLAIN, group_size={"*.attn1.qkv": 12, "transformer_blocks.1.ff.net.2": 32, "*": None})
    sizes = {target.name: target.spec.group_size for target in find_targets(model, config)}
    assert sizes == dict(zip(NAMES, (12, 24, 24, 96, 12, 24, 24, 32), strict=True))
    config = dataclasses.replace(PLAIN, group_size=(4, 5, 6, 7, 8, 9, 10, None))
    assert [t.spec.group_size for t in find_targets(model, config)] == [4, 5, 6, 7, 8, 9, 10, 96]
    record = qdit.quantize(model, config).qdit_records[1]
    assert (record.group_size, record.short_group) == (5, 4)


def test_adaln_weights_and_kept_layers(model, inputs):
    config = dataclasses.replace(
        PLAIN, adaln_bits=8, modules_to_not_convert=("*.ff.*",), act_granularity={"*": "sample"}
    )
    quantised = qdit.quantize(model, config)
    adaln = quantised.transformer_blocks[0].norm1.linear
    assert isinstance(adaln, QuantLinear)
    assert (adaln.spec.act, adaln.spec.wbits, adaln.spec.group_size) == ("none", 8, 8)
    assert isinstance(quantised.transformer_blocks[0].ff.net[2], nn.Linear)
    assert quantised.transformer_blocks[0].attn1.qkv.spec.act_granularity == "sample"
    assert torch.isfinite(inputs.run(quantised, inputs)).all()
    kept = qdit.quantize(model, dataclasses.replace(config, modules_to_not_convert=("*norm1.linear",)))
    assert isinstance(kept.transformer_blocks[0].norm1.linear, nn.Linear)


def test_dequantize_gives_ordinary_layers(model, inputs, tmp_path):
    weights_only = qdit.quantize(model, dataclasses.replace(PLAIN, act="none"))
    plain = qdit.dequantize(weights_only)
    assert not any(isinstance(module, QuantLinear) for module in plain.modules())
    torch.testing.assert_close(inputs.run(plain, inputs), inputs.run(weights_only, inputs))
    qdit.save_pretrained(plain, tmp_path)
    assert torch.equal(inputs.run(qdit.load_pretrained(tmp_path), inputs), inputs.run(plain, inputs))
    with pytest.raises(InputError, match="not quantised"):
        qdit.dequantize(model)


def test_folding_the_spread_changes_no_output_but_the_weights(model, inputs):
    before = inputs.run(model, inputs)
    weight = model.transformer_blocks[0].ff.net[0].proj.weight.detach().clone()
    fold_channel_spread(model, torch.Generator().manual_seed(0))
    torch.testing.assert_close(inputs.run(model, inputs), before, rtol=1e-4, atol=1e-5)
    assert not torch.equal(model.transformer_blocks[0].ff.net[0].proj.weight, weight)


def test_bfloat16_models_keep_their_scales(model, inputs):
    quantised = qdit.quantize(model, PLAIN)
    scales = [m.scale.clone() for m in quantised.modules() if isinstance(m, QuantLinear)]
    half = copy.deepcopy(quantised).to(torch.bfloat16)
    for module, scale in zip((m for m in half.modules() if isinstance(m, QuantLinear)), scales, strict=True):
        assert torch.equal(module.scale, scale)
    layer = half.get_submodule(NAMES[0])
    x = torch.randn(2, 3, 24)
    expected = quantised.get_submodule(NAMES[0])(x.bfloat16().float())
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    assert (layer(x.bfloat16()).float() - expected).norm() <= 1e-2 * expected.norm()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"wbits": 9}, ("wbits", "found 9", "2 to 8")),
        ({"abits": 1}, ("abits", "found 1")),
        ({"wbits": 16, "abits": 16}, ("16 and 16",)),
        ({"wbits": True}, ("wbits",)),
        ({"group_size": 0}, ("group_size", "found 0", "'row'")),
        ({"group_size": 1.5}, ("group_size", "found 1.5")),
        ({"group_size": {"*": -1}}, ("group_size", "found -1")),
        ({"act": "sometimes"}, ("act", "sometimes")),
        ({"act": "static", "a_sym": True}, ("a_sym",)),
        ({"act_granularity": "batch"}, ("act_granularity", "batch")),
        ({"adaln_bits": 16}, ("adaln_bits", "16")),
        ({"scale_dtype": "bfloat16"}, ("scale_dtype", "bfloat16")),
    ],
)
def test_bad_settings_are_named(changes, words):
    with pytest.raises(InputError) as caught:
        dataclasses.replace(PLAIN, **changes)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"group_size": 25}, ("transformer_blocks.0.attn1.qkv", "found 25", "24 columns")),
        ({"group_size": {"nope.*": 8, "*": 8}}, ("pattern nope.*", "transformer_blocks.1.ff.net.2")),
        ({"group_size": {"*.qkv": 8}}, ("transformer_blocks.0.attn1.to_out.0", "such as '*'")),
        ({"group_size": (8, 8)}, ("2 entries", "8, one a layer")),
        ({"modules_to_not_convert": ("nope",)}, ("modules_to_not_convert: pattern nope",)),
        ({"modules_to_not_convert": ("*",)}, ("no layer to quantise",)),
        ({"act_granularity": {"nope": "token"}}, ("act_granularity: pattern nope",)),
    ],
)
def test_settings_that_do_not_fit_the_model_are_named(model, changes, words):
    with pytest.raises(InputError) as caught:
        qdit.quantize(model, dataclasses.replace(PLAIN, **changes))
    for word in words:
        assert word in str(caught.value)


def test_bad_models_are_named(model):
    with pytest.raises(InputError, match="backend"):
        qdit.quantize(model, PLAIN, backend="magic")
    with pytest.raises(InputError, match="quantised already"):
        qdit.quantize(qdit.quantize(model, PLAIN), PLAIN)
    with pytest.raises(InputError, match="no layer to quantise"):
        qdit.quantize(nn.ReLU(), PLAIN)
    with pytest.raises(InputError, match="a single linear layer"):
        qdit.quantize(nn.Linear(8, 4), PLAIN)
    with pytest.raises(InputError, match="something to quantise"):
        qdit.quantize(model, dataclasses.replace(PLAIN, wbits=16, act="none"))
    model.transformer_blocks[1].ff.net[2].weight.data[0, :3] = torch.nan
    with pytest.raises(InputError, match=r"tensor transformer_blocks.1.ff.net.2.weight: found 3 values"):
        qdit.quantize(model, PLAIN)


def test_plans(tmp_path):
    plan = tmp_path / "plan.json"
    plan.write_text('{"a": 4, "b": "row", "*": {"group_size": 8, "act_granularity": "tensor"}}')
    assert read_plan(plan) == ({"a": 4, "b": None, "*": 8}, {"a": "token", "b": "token", "*": "tensor"})
    for text, words in (
        ("[]", "a mapping"),
        ("{}", "a mapping"),
        ('{"a": 0}', "layer a: group_size: found 0, expected a whole number of at least 1 or 'row'"),
        ('{"a": null}', "layer a: group_size"),
        ('{"a": "big"}', "layer a: group_size: found 'big'"),
        ('{"a": {"act_granularity": "token"}}', "layer a"),
        ('{"a": {"group_size": 4, "bits": 2}}', "layer a"),
        ('{"a": {"group_size": 4, "act_granularity": "x"}}', "act_granularity: found 'x'"),
        ('{"a": 4', "plan.json:1: not JSON"),
    ):
        plan.write_text(text)
        with pytest.raises(InputError) as caught:
            read_plan(plan)
        assert "plan.json" in str(caught.value)
        assert words in str(caught.value)


class AnyModule(nn.Module):
    """No transformer: linear layers behind the call that a noise model gets."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 6, bias=False))

    def forward(self, x, timestep, class_labels):
        return self.net(x)


def test_any_module_with_linear_layers(inputs):
    model = AnyModule()
    some = dataclasses.replace(inputs, x=inputs.x[:, :, :4, :6])
    for gptq in (False, True):
        quantised = qdit.quantize(model, QDiTConfig(8, 8, {"net.0": 4, "net.2": None}, gptq=gptq), some)
        assert [record.name for record in quantised.qdit_records] == ["net.0", "net.2"]
        assert 0 < qdit.noise_error(model, quantised, some) < 1e-3
    with pytest.raises(InputError, match="at most its 5 columns"):
        qdit.quantize(model, QDiTConfig(group_size=6, gptq=False))
