"""Quantised models through diffusers' own loading and saving, and latent models on the command line."""

import copy
import dataclasses
import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import qdit
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel, PipelineQuantizationConfig
from diffusers.quantizers import auto
from papercore.errors import InputError
from qdit.cli import main
from qdit.config import QDiTConfig
from qdit.layers import QuantLinear
from qdit.original import set_frequency_shift
from qdit.pipeline import WEIGHTS
from safetensors.torch import load_file, save_file

PLAIN = QDiTConfig(wbits=4, abits=8, group_size=8, gptq=False)
QKV = "transformer_blocks.0.attn1.qkv"


@pytest.fixture(autouse=True)
def registered():
    """Every test runs in a diffusers that knows the method, and leaves none behind."""
    qdit.register()
    qdit.register()
    yield
    forget()


def forget() -> None:
    auto.AUTO_QUANTIZER_MAPPING.pop("qdit", None)
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING.pop("qdit", None)
    if "from_config" in vars(DiTTransformer2DModel):
        del DiTTransformer2DModel.from_config


def integers(model) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.state_dict().items() if not value.is_floating_point()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def test_importing_registers_nothing():
    code = (
        "import qdit, qdit.hub, qdit.pipeline; from diffusers.quantizers import auto;"
        "from diffusers import DiTTransformer2DModel as M;"
        "assert 'qdit' not in auto.AUTO_QUANTIZER_MAPPING and 'from_config' not in vars(M);"
        "qdit.register(); assert 'qdit' in auto.AUTO_QUANTIZER_MAPPING"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gptq": True, "act": "static", "scale_dtype": "float32"},
        {"adaln_bits": 4, "group_size": {"*.qkv": 4, "*": None}, "act_granularity": {"*.qkv": "sample", "*": "token"}},
        {"wbits": 16, "modules_to_not_convert": ("*.ff.net.2",)},
    ],
)
def test_both_savers_and_both_loaders_give_the_same_bits(model, inputs, tmp_path, changes):
    quantised = qdit.quantize(model, dataclasses.replace(PLAIN, **changes), inputs)
    expected = inputs.run(quantised, inputs)
    qdit.save_pretrained(quantised, tmp_path / "ours")
    quantised.save_pretrained(tmp_path / "theirs")
    ours, theirs = (json.loads((tmp_path / side / "config.json").read_text()) for side in ("ours", "theirs"))
    assert ours["quantization_config"] == theirs["quantization_config"]
    assert same(load_file(tmp_path / "ours" / WEIGHTS), load_file(tmp_path / "theirs" / WEIGHTS))
    for side in ("ours", "theirs"):
        again = DiTTransformer2DModel.from_pretrained(tmp_path / side)
        assert not again.training
        assert torch.equal(inputs.run(again, inputs), expected)
        assert torch.equal(inputs.run(qdit.load_pretrained(tmp_path / side), inputs), expected)
        again.save_pretrained(tmp_path / "twice")
        assert same(load_file(tmp_path / "twice" / WEIGHTS), load_file(tmp_path / "theirs" / WEIGHTS))


def test_quantising_while_loading(model, inputs, tmp_path):
    model.save_pretrained(tmp_path / "full")
    setting = dataclasses.replace(PLAIN, adaln_bits=6)
    expected = inputs.run(qdit.quantize(model, setting), inputs)
    fields = {"wbits": 4, "abits": 8, "group_size": 8, "gptq": False, "adaln_bits": 6}
    for given in (setting, qdit.DiffusersConfig(**fields), {"quant_method": "qdit", **fields}):
        loaded = DiTTransformer2DModel.from_pretrained(tmp_path / "full", quantization_config=given)
        assert torch.equal(inputs.run(loaded, inputs), expected)
    loaded.save_pretrained(tmp_path / "packed")
    for load in (DiTTransformer2DModel.from_pretrained, qdit.load_pretrained):
        assert torch.equal(inputs.run(load(tmp_path / "packed"), inputs), expected)
    half = DiTTransformer2DModel.from_pretrained(
        tmp_path / "full", quantization_config=setting, torch_dtype=torch.bfloat16
    )
    assert half.dtype == torch.bfloat16
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    rounded = qdit.quantize(copy.deepcopy(model).to(torch.bfloat16), setting)
    assert same(integers(half), integers(rounded))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_another_type_leaves_the_scales_exact(model, inputs, tmp_path, dtype):
    quantised = qdit.quantize(model, dataclasses.replace(PLAIN, act="static", scale_dtype="float32"), inputs)
    qdit.save_pretrained(quantised, tmp_path)
    loaded = DiTTransformer2DModel.from_pretrained(tmp_path, torch_dtype=dtype)
    assert loaded.dtype == dtype
    assert same(integers(loaded), integers(quantised))
    out = loaded(inputs.x.to(dtype), timestep=inputs.t, class_labels=inputs.y).sample
    assert out.dtype == dtype
    expected = inputs.run(quantised, inputs)
    assert (out.float() - expected).abs().max() < 0.1 * expected.abs().max()
    with pytest.raises(ValueError, match="Casting a quantized model"):
        loaded.to(torch.float32)


def test_shards(model, inputs, tmp_path):
    quantised = qdit.quantize(model, PLAIN)
    quantised.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    expected = inputs.run(quantised, inputs)
    for load in (DiTTransformer2DModel.from_pretrained, qdit.load_pretrained):
        assert torch.equal(inputs.run(load(tmp_path), inputs), expected)
    qdit.save_pretrained(model, tmp_path)  # the old shards do not come back
    assert torch.equal(inputs.run(qdit.load_pretrained(tmp_path), inputs), inputs.run(model, inputs))


@pytest.mark.parametrize("packed", [False, True])
def test_frequency_shift_and_shared_embedders_survive(model, inputs, tmp_path, packed):
    model.transformer_blocks[1].norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    set_frequency_shift(model, 0)
    qdit.share_embedders(model)
    if packed:
        model = qdit.quantize(model, PLAIN)
    expected = inputs.run(model, inputs)
    model.save_pretrained(tmp_path)
    for load in (DiTTransformer2DModel.from_pretrained, qdit.load_pretrained):
        again = load(tmp_path)
        assert torch.equal(inputs.run(again, inputs), expected)
        assert again.config.timestep_frequency_shift == 0
        assert again.config.shared_embedders
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"timestep_frequency_shift": "zero"}))
    with pytest.raises(InputError, match="timestep_frequency_shift: found 'zero', expected a number"):
        DiTTransformer2DModel.from_pretrained(tmp_path)


def test_what_needs_calibration_is_refused(model, tmp_path):
    model.save_pretrained(tmp_path)
    for changes, words in (
        ({"gptq": True}, "field gptq: found True, expected False: from_pretrained has no calibration inputs"),
        ({"act": "static"}, "field act: found static, expected dynamic"),
        ({"group_size": 100}, "group size of layer transformer_blocks.0.attn1.qkv: found 100"),
        ({"modules_to_not_convert": ("nothing.*",)}, "no layer of that name"),
    ):
        setting = dataclasses.replace(PLAIN, **changes)
        with pytest.raises(InputError, match=words) as caught:
            DiTTransformer2DModel.from_pretrained(tmp_path, quantization_config=setting)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="quantization_config: field wbit: found a name that does not exist"):
        DiTTransformer2DModel.from_pretrained(tmp_path, quantization_config=qdit.DiffusersConfig(wbit=4, gptq=False))
    with pytest.raises(InputError, match="device_map: found several devices"):
        DiTTransformer2DModel.from_pretrained(
            tmp_path, quantization_config=PLAIN, device_map={"pos_embed": "cpu", "": "meta"}
        )


def edit_json(path, **changes):
    config = json.loads(path.read_text())
    config["quantization_config"].update(changes)
    path.write_text(json.dumps(config))


def edit_tensors(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda d: edit_json(d / "config.json", format=2), ("config.json", "format", "found 2")),
        (lambda d: edit_json(d / "config.json", wbits="4"), ("config.json", "field wbits", "'4'")),
        (lambda d: edit_json(d / "config.json", wbits=8), (WEIGHTS, "qweight", "found shape (24, 12)")),
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
    ],
)
def test_damage_is_named_as_by_our_own_loader(model, tmp_path, damage, words):
    qdit.save_pretrained(qdit.quantize(model, PLAIN), tmp_path)
    damage(tmp_path)
    messages = []
    for load in (DiTTransformer2DModel.from_pretrained, qdit.load_pretrained):
        with pytest.raises(InputError) as caught:
            load(tmp_path)
        messages.append(str(caught.value))
        assert str(tmp_path) in messages[-1]
        for word in words:
            assert word in messages[-1]
    assert messages[0] == messages[1]


def test_pickled_weights_are_refused(model, tmp_path):
    quantised = qdit.quantize(model, PLAIN)
    quantised.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(InputError, match=r"\.bin: weights are refused: found \.bin, expected safetensors"):
        DiTTransformer2DModel.from_pretrained(tmp_path)


def test_without_registering_nothing_is_loaded_wrongly(model, tmp_path):
    forget()
    qdit.quantize(model, PLAIN).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Unknown quantization type, got qdit"):
        DiTTransformer2DModel.from_pretrained(tmp_path)


def test_a_dequantised_model_no_longer_says_it_is_quantised(model, inputs):
    quantised = qdit.quantize(model, dataclasses.replace(PLAIN, act="none"))
    plain = qdit.dequantize(quantised)
    assert torch.equal(inputs.run(plain, inputs), inputs.run(quantised, inputs))
    assert "quantization_config" not in plain.config
    assert not hasattr(plain, "hf_quantizer")
    assert "quantization_config" in quantised.config
    assert "quantization_config" not in model.config


# ---- latent models


@pytest.fixture
def latent() -> DiTTransformer2DModel:
    """A DiT of 4-channel latents with 1000 classes, as diffusers' pipeline takes them."""
    torch.manual_seed(0)
    return DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1000,
    ).eval()


@pytest.fixture
def vae() -> AutoencoderKL:
    torch.manual_seed(1)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(8, 8),
        norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        scaling_factor=0.5,
    ).eval()


def run(pipeline) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline([1, 2], num_inference_steps=3, generator=generator, output_type="np").images


def test_pipelines(latent, vae, tmp_path):
    quantised = qdit.quantize(latent, PLAIN)
    whole = DiTPipeline(quantised, vae, DDIMScheduler())
    expected = run(whole)
    assert expected.shape == (2, 16, 16, 3)
    whole.save_pretrained(tmp_path / "packed")
    again = DiTPipeline.from_pretrained(tmp_path / "packed")
    assert any(isinstance(module, QuantLinear) for module in again.transformer.modules())
    assert np.array_equal(run(again), expected)
    DiTPipeline(latent, vae, DDIMScheduler()).save_pretrained(tmp_path / "full")
    setting = PipelineQuantizationConfig(
        quant_mapping={"transformer": qdit.DiffusersConfig(wbits=4, abits=8, group_size=8, gptq=False)}
    )
    assert np.array_equal(run(DiTPipeline.from_pretrained(tmp_path / "full", quantization_config=setting)), expected)


def command(*arguments: object) -> int:
    sys.argv = ["qdit", *map(str, arguments)]
    return main()


def test_sampling_latents_on_the_command_line(latent, vae, tmp_path, capsys):
    qdit.save_pretrained(qdit.quantize(latent, dataclasses.replace(PLAIN, abits=16, adaln_bits=4)), tmp_path / "model")
    vae.save_pretrained(tmp_path / "vae")
    options = ("sample", tmp_path / "model", "--labels", "1,999", "--count", 2, "--steps", 3, "--device", "cpu")
    pictures = []
    for name, flag in (("plain", "--no-precompute"), ("tables", "--precompute")):
        assert command(*options, "--vae", tmp_path / "vae", flag, "--out", tmp_path / f"{name}.npz") == 0
        assert (tmp_path / f"{name}.png").exists()
        with np.load(tmp_path / f"{name}.npz") as archive:
            pictures.append(archive["arr_0"].astype(int))
    assert pictures[0].shape == (4, 16, 16, 3)
    assert np.abs(pictures[0] - pictures[1]).max() <= 1
    z = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    latents = qdit.sample(qdit.load_pretrained(tmp_path / "model"), z, torch.tensor([1, 1, 999, 999]), 3, guidance=1.5)
    with torch.no_grad():
        expected = qdit.images_to_uint8(vae.decode(latents / 0.5).sample)
    assert np.abs(pictures[0] - expected.numpy()).max() <= 1
    # pipelines as folders of the model and of the autoencoder; the former name of the class
    DiTPipeline(latent, vae, DDIMScheduler()).save_pretrained(tmp_path / "pipeline")
    where = tmp_path / "pipeline" / "transformer" / "config.json"
    config = {**json.loads(where.read_text()), "_class_name": "Transformer2DModel", "cross_attention_dim": None}
    where.write_text(json.dumps(config))
    published = qdit.load_pretrained(tmp_path / "pipeline")
    assert all(torch.equal(value, latent.state_dict()[name]) for name, value in published.state_dict().items())
    both = (tmp_path / "pipeline", "--vae", tmp_path / "pipeline", "--out", tmp_path / "p.npz")
    assert command("sample", *both, *options[2:]) == 0
    for field, value in (("use_linear_projection", True), ("norm_type", "layer_norm")):
        where.write_text(json.dumps({**config, field: value}))
        with pytest.raises(InputError, match=f"config.json: .*{field}.*: found .*{value}"):
            qdit.load_pretrained(tmp_path / "pipeline")

    three = AutoencoderKL(**{**vae.config, "latent_channels": 3})
    three.save_pretrained(tmp_path / "three")
    for name, change in (("missing", lambda t: t.pop("decoder.conv_in.weight")), ("other", lambda t: None)):
        vae.save_pretrained(tmp_path / name)
        edit_tensors(tmp_path / name / WEIGHTS, change)
    (tmp_path / "other" / WEIGHTS).write_bytes(b"cut off")
    vae.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    capsys.readouterr()
    for arguments, words in (
        ((), ("config.json", "in_channels", "found 4", "--vae")),
        (("--vae", tmp_path / "absent"), ("absent", "cannot be read")),
        (("--vae", tmp_path / "model"), ("_class_name", "'DiTTransformer2DModel'", "'AutoencoderKL'")),
        (("--vae", tmp_path / "three"), ("latent_channels: found 3, expected 4",)),
        (("--vae", tmp_path / "missing"), ("tensor decoder.conv_in.weight", "nothing")),
        (("--vae", tmp_path / "other"), ("other", "found")),
        (("--vae", tmp_path / "pickled"), ("pickled weights are refused",)),
    ):
        assert command(*options, *arguments, "--out", tmp_path / "x.npz") == 2, arguments
        err = capsys.readouterr().err
        line = [line for line in err.splitlines() if line.startswith("error: ")]
        assert len(line) == 1, err
        for word in words:
            assert word in line[0]


# ---- checkpoints in the original naming


def original_naming(width: int = 24, depth: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "x_embedder.proj": (width, 4, 2, 2),
        "t_embedder.mlp.0": (width, 256),
        "t_embedder.mlp.2": (width, width),
        "final_layer.linear": (32, width),
        "final_layer.adaLN_modulation.1": (2 * width, width),
    }
    for i in range(depth):
        for name, shape in (
            ("attn.qkv", (3 * width, width)),
            ("attn.proj", (width, width)),
            ("mlp.fc1", (4 * width, width)),
            ("mlp.fc2", (width, 4 * width)),
            ("adaLN_modulation.1", (6 * width, width)),
        ):
            shapes[f"blocks.{i}.{name}"] = shape
    tensors = {"y_embedder.embedding_table.weight": torch.randn(11, width, generator=generator)}
    for name, shape in shapes.items():
        tensors[f"{name}.weight"] = 0.1 * torch.randn(*shape, generator=generator)
        tensors[f"{name}.bias"] = 0.1 * torch.randn(shape[0], generator=generator)
    tensors["pos_embed"] = torch.zeros(1, 16, width)
    return tensors


class Stranger:
    """Something that no checkpoint may hold."""


def test_importing_the_original_naming(tmp_path, capsys):
    tensors = original_naming()
    save_file(tensors, tmp_path / "a.safetensors")
    torch.save(tensors, tmp_path / "a.pt")
    torch.save({"model": {}, "ema": tensors}, tmp_path / "training.pt")
    sizes = ("--heads", 2, "--patch", 2, "--input-size", 8, "--classes", 10)
    expected = qdit.from_original(tensors, num_heads=2, patch_size=2, input_size=8, num_classes=10)
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([3, 900]), torch.tensor([1, 10])
    with torch.no_grad():
        expected = expected(x, timestep=t, class_labels=y).sample
    for name, options in (("a.safetensors", ()), ("a.pt", ("--no-share-embedders",)), ("training.pt", ())):
        folder = tmp_path / f"from {name}"
        assert command("import", tmp_path / name, *sizes, "--out", folder, *options) == 0
        for load in (qdit.load_pretrained, DiTTransformer2DModel.from_pretrained):
            model = load(folder)
            with torch.no_grad():
                assert torch.equal(model(x, timestep=t, class_labels=y).sample, expected)
        stored = [name for name in load_file(folder / WEIGHTS) if "class_embedder" in name]
        assert len(stored) == (2 if options else 1)

    (tmp_path / "stranger.pt").write_bytes(pickle.dumps(Stranger()))
    torch.save({"args": Stranger(), **tensors}, tmp_path / "objects.pt")
    torch.save({**tensors, "epoch": 3}, tmp_path / "epoch.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "a.pt").read_bytes()[:2000])
    (tmp_path / "cut.safetensors").write_bytes(b"x")
    (tmp_path / "a.ckpt").write_bytes(b"x")
    save_file({**tensors, "pos_embed": torch.full((1,), torch.nan)}, tmp_path / "nan.safetensors")
    save_file({k: v for k, v in tensors.items() if "fc2.bias" not in k}, tmp_path / "less.safetensors")
    capsys.readouterr()
    for name, changes, words in (
        ("stranger.pt", {}, ("pickled objects are refused",)),
        ("objects.pt", {}, ("pickled objects are refused",)),
        ("epoch.pt", {}, ("entry epoch: found int",)),
        ("list.pt", {}, ("found list",)),
        ("cut.pt", {}, ("damaged checkpoint",)),
        ("cut.safetensors", {}, ("damaged weights",)),
        ("absent.pt", {}, ("no such file",)),
        ("a.ckpt", {}, ("found .ckpt, expected .safetensors or .pt",)),
        ("nan.safetensors", {}, ("tensor pos_embed", "1 values that are not finite")),
        ("less.safetensors", {}, ("transformer_blocks.0.ff.net.2.bias",)),
        ("a.pt", {"--classes": 9}, ("class_embedder", "(11, 24)")),
        ("a.pt", {"--heads": 7}, ("num_heads", "found 7")),
        ("a.pt", {"--patch": 0}, ("--patch: found 0",)),
    ):
        given = dict(zip(sizes[::2], sizes[1::2], strict=True)) | changes
        flags = [part for pair in given.items() for part in pair]
        assert command("import", tmp_path / name, *flags, "--out", tmp_path / "refused") == 2, name
        err = capsys.readouterr().err
        assert err.startswith("error: "), err
        assert err.count("\n") == 1, err
        for word in (*words, *(() if changes else (name,))):
            assert word in err
    assert not (tmp_path / "refused").exists()
