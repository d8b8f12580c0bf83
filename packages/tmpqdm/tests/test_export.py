"""Exported networks: equal to the simulated ones, small, and refused when damaged."""

import json
import sys
import types

import pytest
import torch
from diffusers import DDPMScheduler
from papercore.errors import InputError, WorkError
from safetensors.torch import load_file, save_file
from tmpqdm.calibration import CalibrationSet, collect_calibration
from tmpqdm.export import check_equal, export, load_exported, load_torchao_config, torchao_config
from tmpqdm.solver import PrecisionSolver
from tmpqdm.synthetic import random_mixture, tiny_dit, tiny_text_unet, tiny_unet
from torch import nn

MODELS = {"unet": tiny_unet, "text": tiny_text_unet, "dit": tiny_dit}


def calibrated(name: str, **options):
    model = MODELS[name]().eval()
    cond = {"encoder_hidden_states": torch.randn(3, 5, 12)} if name == "text" else None
    labels = [1, 2] if name == "dit" else None
    data = collect_calibration(model, DDPMScheduler(), samples=3, timesteps=[20, 800], cond=cond, labels=labels)
    solver = PrecisionSolver.from_model(model, **options)
    solver.calibrate(data, method="minmax", batch_size=3)
    return solver, (data.x, data.t, data.cond)


@pytest.fixture(scope="module")
def unet():
    return calibrated("unet", bits=(8, 5, 3))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("unet", {"bits": (8, 5, 3), "act_symmetric": False, "softmax_bits": "search"}),
        ("text", {"bits": (16, 7, 4), "softmax_bits": None, "pin": {"last": 9}}),
        ("dit", {"bits": (6, 2)}),
    ],
)
def test_the_exported_network_is_the_simulated_one(tmp_path, name, options):
    solver, inputs = calibrated(name, **options)
    mixture = random_mixture(solver, 1)
    size = export(solver, mixture, tmp_path)
    network = load_exported(tmp_path)
    assert type(network) is type(solver.network)
    assert check_equal(solver.apply(mixture), network, inputs) == 0
    assert not any(p.requires_grad for p in network.parameters()) and not network.training
    assert size == sum(v.numel() * v.element_size() for v in load_file(tmp_path / "model.safetensors").values())


def test_the_file_is_as_small_as_its_bits(unet, tmp_path):
    solver, _ = unet
    export(solver, solver.uniform(3), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    weight = solver.layers["mid_block.resnets.0.conv1"].weight
    codes = tensors["mid_block.resnets.0.conv1.codes"]
    assert codes.dtype == torch.uint8 and codes.numel() == len(weight) * -(-weight[0].numel() * 3 // 8)
    assert not any(name.endswith("layer.weight") for name in tensors)


def test_other_models_need_to_be_given(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential()

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 3)

        def forward(self, x, t):
            return self.conv(x)

    model, x, t = Net(), torch.randn(4, 1, 5, 5), torch.arange(4)
    solver = PrecisionSolver.from_model(model, bits=(8, 4), example=(x, t))
    solver.calibrate(CalibrationSet(x, t), method="minmax", batch_size=4)
    export(solver, solver.uniform(4), tmp_path, extra={"timesteps": [1, 2]})
    with pytest.raises(InputError, match="class: found Net"):
        load_exported(tmp_path)
    network = load_exported(tmp_path, Net())
    assert check_equal(solver.apply(solver.uniform(4)), network, (x, t, {})) == 0
    assert json.loads((tmp_path / "config.json").read_text())["timesteps"] == [1, 2]


def test_a_difference_is_an_error(unet):
    solver, inputs = unet
    with pytest.raises(WorkError, match="differ from the simulated ones"):
        check_equal(solver.apply(solver.uniform(8)), solver.apply(solver.uniform(3)), inputs)


def test_damaged_files(unet, tmp_path):
    solver, _ = unet
    export(solver, solver.uniform(5), tmp_path)
    file, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    tensors, text = load_file(file), config.read_text()
    for changed, message in (
        ({k: v for k, v in tensors.items() if k != "conv_in.scale"}, r"tensor conv_in\.scale: found nothing"),
        (tensors | {"more": torch.zeros(1)}, "tensor more: found a tensor the network does not have"),
        (tensors | {"conv_in.scale": torch.zeros(3)}, r"tensor conv_in\.scale: found shape \(3,\)"),
        (tensors | {"conv_in.codes": torch.zeros(16, 2, dtype=torch.uint8)}, "packed row: found 2 bytes"),
        (tensors | {"conv_norm_out.weight": torch.zeros(3)}, r"tensor conv_norm_out\.weight: found shape \(3,\)"),
    ):
        save_file(changed, file)
        with pytest.raises(InputError, match=message):
            load_exported(tmp_path)
    save_file(tensors, file)
    for changed, message in (
        ("{", "not JSON"),
        ("[]", "format: found list"),
        (text.replace("tmpqdm-network", "other"), "format: found other"),
        (text.replace('"splits"', '"spl"'), "key splits"),
        (text.replace('"conv_in"', '"conv_inn"'), "operation conv_inn"),
    ):
        config.write_text(changed)
        with pytest.raises(InputError, match=message):
            load_exported(tmp_path)
    config.write_text(text)
    load_exported(tmp_path)


def test_torchao(tmp_path, monkeypatch):
    solver, _ = calibrated("dit", bits=(8, 4))
    mixture = solver.uniform(8)
    names = [name for name, layer in solver.layers.items() if isinstance(layer.layer, nn.Linear)]
    mixture[names[0]] = {"w": 4, "a": 8}
    mixture[names[1]] = {"w": 4, "a": 4}
    written = torchao_config(solver, mixture)
    assert written["not_covered"] == ["pos_embed.proj"] and len(written["modules"]) == len(names)
    path = tmp_path / "torchao.json"
    path.write_text(json.dumps(written))
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(InputError, match="torchao: found not installed"):
        load_torchao_config(path)

    class Recorded:
        def __init__(self, *args, **kwargs) -> None:
            self.args, self.kwargs = args, kwargs

    kinds = ("Int8DynamicActivationInt8WeightConfig", "Int8DynamicActivationIntxWeightConfig", "IntxWeightOnlyConfig",
             "FqnToConfig", "PerAxis")  # fmt: skip
    stand_in = types.ModuleType("torchao.quantization")
    for kind in kinds:
        setattr(stand_in, kind, type(kind, (Recorded,), {}))
    monkeypatch.setitem(sys.modules, "torchao", types.ModuleType("torchao"))
    monkeypatch.setitem(sys.modules, "torchao.quantization", stand_in)
    (made,) = load_torchao_config(path).args
    assert [type(made[name]).__name__ for name in names[:3]] == [kinds[1], kinds[2], kinds[0]]
    assert made[names[0]].kwargs["weight_dtype"] == torch.int4 and "weight_granularity" in made[names[0]].kwargs
    assert made[names[1]].kwargs["granularity"].args == (0,) and not made[names[2]].kwargs
    path.write_text("{}")
    with pytest.raises(InputError, match="format"):
        load_torchao_config(path)
