"""Solver files: everything comes back, and files of other models change nothing."""

import json

import pytest
import torch
from diffusers import DDPMScheduler
from papercore.errors import InputError
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tmpqdm.calibration import collect_calibration
from tmpqdm.solver import PrecisionSolver
from tmpqdm.synthetic import random_mixture, tiny_dit, tiny_unet


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    model = tiny_unet().eval()
    data = collect_calibration(model, DDPMScheduler(), samples=3, timesteps=[20, 800])
    solver = PrecisionSolver.from_model(model, bits=(8, 4), act_symmetric=False, pin={"conv_out": 6})
    solver.calibrate(data, weight_iters=2, act_iters=2, batch_size=3, rounding_rate=0.5)
    path = tmp_path_factory.mktemp("solver") / "solver.safetensors"
    solver.save(path)
    return model, data, solver, path


@torch.no_grad()
def test_everything_comes_back(made):
    model, data, solver, path = made
    loaded = PrecisionSolver.load(path, model)
    assert loaded.ops == solver.ops and loaded.bits == solver.bits and loaded.calibrated == solver.calibrated
    for seed in range(3):
        mixture = random_mixture(solver, seed)
        outputs = []
        for one in (solver, loaded):
            one.set_bits(mixture)
            outputs.append(one.network(data.x, data.t).sample)
        assert torch.equal(*outputs)


def test_names_and_size(made):
    *_, solver, path = made
    tensors = load_file(path)
    shortcut = "up_blocks.0.resnets.0.conv_shortcut"
    assert {f"conv_in/w/8/{part}" for part in ("delta", "zero", "round")} <= set(tensors)
    assert f"{shortcut}/w/4/half1/round" in tensors and f"{shortcut}/a/4/half1/delta" in tensors
    assert "mid_block.attentions.0/p/8/delta" in tensors and "conv_out/w/4/delta" not in tensors
    weight = solver.layers["conv_in"].weight
    assert tensors["conv_in/w/8/round"].numel() == -(-weight.numel() // 8)
    with safe_open(path, "pt") as file:
        metadata = json.loads(file.metadata()["tmpqdm"])
    assert metadata["bits"] == [8, 4] and metadata["splits"] == solver.splits and metadata["format"] == "tmpqdm-solver"


def test_other_models(made):
    model, _, _, path = made
    with pytest.raises(InputError, match=r"model_hash: found .*of the model's weights"):
        PrecisionSolver.load(path, tiny_unet(seed=1))
    with pytest.raises(InputError, match=r"operations of another model: found .*pos_embed\.proj: missing"):
        PrecisionSolver.load(path, tiny_dit())
    wider = type(model).from_config(dict(model.config) | {"block_out_channels": (24, 32)})
    with pytest.raises(InputError, match=r"operations of another model: found conv_in: \[16, 1, 3, 3\]"):
        PrecisionSolver.load(path, wider)


def change(path, target, tensors=lambda t: t, metadata=lambda m: m):
    with safe_open(path, "pt") as file:
        values = metadata(json.loads(file.metadata()["tmpqdm"]))
    save_file(tensors(load_file(path)), target, {"tmpqdm": values if isinstance(values, str) else json.dumps(values)})
    return target


def test_damaged_files(made, tmp_path):
    model, _, _, path = made
    target = tmp_path / "changed.safetensors"
    without = "conv_in/w/8/delta"
    for tensors, message in (
        (lambda t: {k: v for k, v in t.items() if k != without}, f"tensors of another model: found {without}: missing"),
        (lambda t: t | {"more": torch.zeros(1)}, r"more: \[1\], expected more: none"),
        (lambda t: t | {without: torch.zeros(2)}, rf"{without}: \[2\]"),
        (lambda t: t | {without: t[without] * float("nan")}, f"tensor {without}: found values that are not finite"),
        (lambda t: t | {without: t[without] * 0}, f"tensor {without}: found a step of 0"),
    ):
        with pytest.raises(InputError, match=message):
            PrecisionSolver.load(change(path, target, tensors), model)
    shortcut = "up_blocks.0.resnets.0.conv_shortcut"
    for metadata, message in (
        (lambda m: m | {"format": "other"}, "format: found other"),
        (lambda m: m | {"version": 9}, "version: found 9"),
        (lambda m: "[", "metadata"),
        (lambda m: "[]", "format: found list"),
        (lambda m: {k: v for k, v in m.items() if k != "splits"}, "metadata splits"),
        (
            lambda m: m | {"splits": m["splits"] | {shortcut: 5}},
            f"split points of another model: found {shortcut}: 5, expected {shortcut}: 32",
        ),
    ):
        with pytest.raises(InputError, match=message):
            PrecisionSolver.load(change(path, target, metadata=metadata), model)
    target.write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"changed\.safetensors: solver"):
        PrecisionSolver.load(target, model)
    with pytest.raises(InputError, match="none"):
        PrecisionSolver.load(tmp_path / "none", model)


def test_only_calibrated_solvers_are_saved(made, tmp_path):
    model, *_ = made
    with pytest.raises(InputError, match="not calibrated"):
        PrecisionSolver.from_model(model).save(tmp_path / "solver.safetensors")
    assert not list(tmp_path.iterdir())
