"""Models and calibration on disk, sampling, evaluation."""

import dataclasses
import json
import pickle

import pytest
import qdit
import torch
from papercore.errors import InputError
from papercore.images import write_images
from qdit.config import QDiTConfig
from qdit.evaluate import image_distance, reference_images
from qdit.layers import QuantLinear
from qdit.original import set_frequency_shift
from qdit.pipeline import WEIGHTS
from qdit.sampling import sample_many
from safetensors.torch import load_file, save_file

PLAIN = QDiTConfig(wbits=4, abits=8, group_size=8, gptq=False)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"wbits": 8, "w_sym": True, "a_sym": True, "scale_dtype": "float32"},
        {"wbits": 3, "group_size": 7},
        {"act": "static", "gptq": True, "act_order": True, "percdamp": 0.05},
        {"wbits": 16},
        {"group_size": {"*.qkv": 4, "*": None}, "act_granularity": {"*.qkv": "sample", "*": "token"}},
        {"adaln_bits": 4, "modules_to_not_convert": ("*.ff.net.2",)},
        {"adaln_bits": 6, "group_size": {"*.attn1.*": 8, "*.ff.*": 12}},
        {"act": "none"},
    ],
)
def test_a_reloaded_model_gives_the_same_bits(model, inputs, tmp_path, changes):
    quantised = qdit.quantize(model, dataclasses.replace(PLAIN, **changes), inputs)
    qdit.save_pretrained(quantised, tmp_path)
    again = qdit.load_pretrained(tmp_path)
    assert torch.equal(inputs.run(again, inputs), inputs.run(quantised, inputs))
    qdit.save_pretrained(again, tmp_path / "twice")
    for name in ("config.json", WEIGHTS):
        assert (tmp_path / name).read_bytes() == (tmp_path / "twice" / name).read_bytes()
    integer = qdit.load_pretrained(tmp_path, backend="integer")
    assert {m.backend for m in integer.modules() if isinstance(m, QuantLinear)} == {"integer"}


def test_full_precision_models_and_the_frequency_shift_are_kept(model, inputs, tmp_path):
    before = inputs.run(model, inputs)
    set_frequency_shift(model, 0)
    shifted = inputs.run(model, inputs)
    assert not torch.equal(before, shifted)
    qdit.save_pretrained(model, tmp_path)
    assert torch.equal(inputs.run(qdit.load_pretrained(tmp_path), inputs), shifted)


def test_diffusers_itself_writes_and_reads_the_full_precision_layout(model, inputs, tmp_path):
    from diffusers import DiTTransformer2DModel

    model.save_pretrained(tmp_path / "theirs", max_shard_size="50KB")
    assert (tmp_path / "theirs" / f"{WEIGHTS}.index.json").exists()
    expected = inputs.run(model, inputs)
    assert torch.equal(inputs.run(qdit.load_pretrained(tmp_path / "theirs"), inputs), expected)
    qdit.save_pretrained(model, tmp_path / "ours")
    assert torch.equal(inputs.run(DiTTransformer2DModel.from_pretrained(tmp_path / "ours"), inputs), expected)


def test_saving_replaces_what_lay_there(model, inputs, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    quantised = qdit.quantize(model, PLAIN)
    qdit.save_pretrained(quantised, tmp_path)
    assert torch.equal(inputs.run(qdit.load_pretrained(tmp_path), inputs), inputs.run(quantised, inputs))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", WEIGHTS]


def test_what_is_stored_is_the_documented_format(model, tmp_path):
    qdit.save_pretrained(qdit.quantize(model, PLAIN), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "qdit"
    assert config["format"] == 1
    assert config["group_sizes"]["transformer_blocks.0.attn1.qkv"] == 8
    tensors = load_file(tmp_path / WEIGHTS)
    name = "transformer_blocks.0.attn1.qkv"
    assert tensors[f"{name}.qweight"].dtype == torch.uint8
    assert tensors[f"{name}.qweight"].shape == (72, 12)
    assert tensors[f"{name}.scale"].dtype == torch.int16
    assert tensors[f"{name}.scale"].shape == tensors[f"{name}.zero"].shape == (72, 3)
    assert tensors[f"{name}.bias"].shape == (72,)
    codes = qdit.unpack_codes(tensors[f"{name}.qweight"], 4, 24)
    scale = tensors[f"{name}.scale"].view(torch.float16).float()
    weight = torch.cat([getattr(model.transformer_blocks[0].attn1, f"to_{part}").weight for part in "qkv"])
    values = qdit.group_dequantize(codes, scale, tensors[f"{name}.zero"].float(), 8)
    assert (values - weight).abs().max() <= 0.51 * scale.max()


def edit_json(path, change):
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def edit_tensors(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


QKV = "transformer_blocks.0.attn1.qkv"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda d: (d / WEIGHTS).write_bytes((d / WEIGHTS).read_bytes()[:-10]), (WEIGHTS, "damaged weights")),
        (lambda d: (d / WEIGHTS).write_bytes(b""), (WEIGHTS, "damaged weights")),
        (lambda d: (d / WEIGHTS).unlink(), ("no weights", WEIGHTS)),
        (lambda d: (d / "config.json").unlink(), ("config.json: cannot be read",)),
        (lambda d: (d / "config.json").write_text("{"), ("config.json:1: not JSON",)),
        (lambda d: (d / "config.json").write_text("[]"), ("_class_name",)),
        (lambda d: edit_json(d / "config.json", lambda c: c.update(num_layers="two")), ("field num_layers", "'two'")),
        (
            lambda d: edit_json(d / "config.json", lambda c: c.update(num_layers=3)),
            ("transformer_blocks.2.attn1.qkv", "none"),
        ),
        (lambda d: edit_json(d / "config.json", lambda c: c.update(patch_size=0)), ("field patch_size", "0")),
        (lambda d: edit_json(d / "config.json", lambda c: c["quantization_config"].update(format=2)), ("format", "2")),
        (
            lambda d: edit_json(d / "config.json", lambda c: c["quantization_config"].update(quant_method="other")),
            ("quant_method", "'other'"),
        ),
        (
            lambda d: edit_json(d / "config.json", lambda c: c["quantization_config"].update(wbits="4")),
            ("config.json: quantization_config: field wbits", "'4' (str)", "whole number"),
        ),
        (
            lambda d: edit_json(d / "config.json", lambda c: c["quantization_config"].update(gptq={"order": 1})),
            ("quantization_config.gptq", "order"),
        ),
        (
            lambda d: edit_json(d / "config.json", lambda c: c["quantization_config"].update(gptq={"percdamp": -1})),
            ("percdamp", "-1"),
        ),
        (
            lambda d: edit_json(d / "config.json", lambda c: c["quantization_config"].update(group_sizes=8)),
            ("group_sizes", "found 8"),
        ),
        (
            lambda d: edit_json(d / "config.json", lambda c: c["quantization_config"].update(wbits=8)),
            ("qweight", "found shape (24, 12)", "expected (24, 24)"),
        ),
        (lambda d: edit_tensors(d / WEIGHTS, lambda t: t.pop(f"{QKV}.scale")), (f"tensor {QKV}.scale", "nothing")),
        (
            lambda d: edit_tensors(d / WEIGHTS, lambda t: t.update({f"{QKV}.scale": torch.ones(72, 3)})),
            (f"tensor {QKV}.scale", "torch.float32", "torch.int16", "quantise again"),
        ),
        (
            lambda d: edit_tensors(d / WEIGHTS, lambda t: t["proj_out_2.bias"].fill_(torch.nan)),
            ("tensor proj_out_2.bias", "4 values that are not finite"),
        ),
        (lambda d: edit_tensors(d / WEIGHTS, lambda t: t.update(extra=torch.ones(1))), ("tensor extra",)),
        (
            lambda d: edit_tensors(d / WEIGHTS, lambda t: t[f"{QKV}.scale"].fill_(0x7E00)),
            (f"tensor {QKV}.scale", "216 values that are not finite"),
        ),
        (
            lambda d: edit_tensors(d / WEIGHTS, lambda t: t.update({"proj_out_2.bias": t["proj_out_2.bias"].int()})),
            ("tensor proj_out_2.bias", "torch.int32", "torch.float32"),
        ),
        (lambda d: (d / f"{WEIGHTS}.index.json").write_text("[]"), ("weight_map",)),
        (
            lambda d: edit_json(d / "config.json", lambda c: c.update(quantization_config=5)),
            ("quantization_config", "5"),
        ),
        (lambda d: edit_json(d / "config.json", lambda c: c.update(activation_fn="nope")), ("configuration of a DiT",)),
        (lambda d: edit_json(d / "config.json", lambda c: c.update(norm_eps="a")), ("norm_eps", "'a'")),
    ],
)
def test_damage_is_named(model, tmp_path, damage, words):
    qdit.save_pretrained(qdit.quantize(model, PLAIN), tmp_path)
    damage(tmp_path)
    with pytest.raises(InputError) as caught:
        qdit.load_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_pickles_are_refused(model, tmp_path):
    qdit.save_pretrained(model, tmp_path)
    (tmp_path / WEIGHTS).unlink()
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps({}))
    with pytest.raises(InputError, match=r"diffusion_pytorch_model\.bin: pickled weights are refused"):
        qdit.load_pretrained(tmp_path)


def test_an_index_may_not_point_outside(model, tmp_path):
    qdit.save_pretrained(model, tmp_path)
    (tmp_path / f"{WEIGHTS}.index.json").write_text('{"weight_map": {"a": "../secret.safetensors"}}')
    with pytest.raises(InputError, match="weight_map"):
        qdit.load_pretrained(tmp_path)


def test_calibration_files(model, inputs, tmp_path):
    path = tmp_path / "c.safetensors"
    inputs.save(path)
    again = qdit.Calibration.load(path)
    assert torch.equal(again.x, inputs.x)
    again.check_fits(model)
    for change, words in (
        (lambda t: t.pop("y"), "key y: found t, x"),
        (lambda t: t.update(x=t["x"][0]), "key x: found torch.float32 (1, 8, 8)"),
        (lambda t: t.update(x=t["x"][:0], t=t["t"][:0], y=t["y"][:0]), "key x"),
        (lambda t: t.update(t=t["t"].float()), "key t: found torch.float32 (24,)"),
        (lambda t: t.update(y=t["y"][:3]), "key y: found torch.int64 (3,)"),
        (lambda t: t["x"].fill_(torch.inf), "key x: found values that are not finite"),
    ):
        inputs.save(path)
        edit_tensors(path, change)
        with pytest.raises(InputError) as caught:
            qdit.Calibration.load(path)
        assert "c.safetensors" in str(caught.value)
        assert words in str(caught.value)
    path.write_bytes(b"junk")
    with pytest.raises(InputError, match="calibration file"):
        qdit.Calibration.load(path)
    with pytest.raises(InputError, match=r"key y: found 3..77, expected 0..10"):
        dataclasses.replace(inputs, y=torch.tensor([3, 77] * 12)).check_fits(model)
    with pytest.raises(InputError, match=r"key x: found images of \(1, 4, 4\)"):
        dataclasses.replace(inputs, x=inputs.x[:, :, :4, :4]).check_fits(model)


def test_calibration_is_what_the_sampler_meets(model):
    options = {"samples": 20, "steps": 5, "guidance": 1.5, "seed": 3}
    some = qdit.collect_calibration(model, null_fraction=0.5, **options)
    assert len(some) == 20
    assert set(some.t.tolist()) <= set(qdit.respaced_timesteps(1000, 5))
    assert 0 < (some.y == 10).sum() < 20
    same = qdit.collect_calibration(model, null_fraction=0.5, **options)
    assert torch.equal(some.x, same.x)
    assert (qdit.collect_calibration(model, null_fraction=0.0, **options).y < 10).all()
    # inputs at the first visited timestep are the noise itself
    assert some.x[some.t == 999].std() == pytest.approx(1, abs=0.2)
    with pytest.raises(InputError, match="null fraction"):
        qdit.collect_calibration(model, samples=4, steps=5, guidance=None, null_fraction=2, seed=0)


def test_samples_do_not_depend_on_the_batch(model):
    labels = torch.arange(6)
    one = sample_many(model, labels, 3, guidance=2.0, seed=0, batch=6)
    torch.testing.assert_close(one, sample_many(model, labels, 3, guidance=2.0, seed=0, batch=2))
    assert sample_many(model, labels[:0], 3, guidance=None, seed=0).shape == (0, 1, 8, 8)
    z = torch.randn(2, 1, 8, 8)
    for guidance in (float("nan"), float("inf")):
        with pytest.raises(InputError, match="guidance"):
            qdit.sample(model, z, torch.tensor([1, 2]), 3, guidance=guidance)
    for labels, words in (([1], "1 labels"), ([1, 12], "1..12")):
        with pytest.raises(InputError, match=words):
            qdit.sample(model, z, torch.tensor(labels), 3)
    with pytest.raises(InputError, match="sampling steps"):
        qdit.sample(model, z, torch.tensor([1, 2]), 0)


def test_distances(tmp_path):
    real = reference_images("digits")
    assert image_distance(real, real, "digits")[0] == pytest.approx(0, abs=1e-3)
    first, second = image_distance(real[::2], real[1::2], "pixels")
    assert 0.1 < first < 0.5
    assert second == 64
    noise = torch.randint(0, 256, (200, 8, 8, 1), dtype=torch.uint8)
    assert image_distance(noise, real, "digits")[0] > 20 * image_distance(real[::2], real[1::2], "digits")[0]
    write_images(tmp_path / "r.npz", real[:20])
    assert torch.equal(reference_images(str(tmp_path / "r.npz")), real[:20])
    for samples, space, words in (
        (noise[:, :4], "digits", "image size"),
        (noise, "nothing", "feature space"),
        (noise, "os:nothing", "feature space"),
        (noise[:1], "pixels", "features"),
    ):
        with pytest.raises(InputError, match=words):
            image_distance(samples, real, space)
