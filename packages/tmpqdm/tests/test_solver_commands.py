"""`calibrate` and `export` from the command line."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from papercore import cli
from papercore.errors import InputError
from safetensors.torch import load_file
from tmpqdm.calibration import collect_calibration
from tmpqdm.commands.solver import Calibrate, Export, parse_pins
from tmpqdm.loading import load_model, load_scheduler
from tmpqdm.plan import Plan
from tmpqdm.solver import PrecisionSolver
from tmpqdm.synthetic import random_mixture, tiny_dit, tiny_unet

COMMANDS: dict[str, type[cli.Command]] = {"calibrate": Calibrate, "export": Export}
QUICK = ["--samples", "4", "--steps", "8", "--use", "3", "--batch-size", "4", "--bits", "8", "4"]


def run(*arguments: object) -> int:
    return cli.main("tmpqdm", COMMANDS, "test", [str(a) for a in arguments])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("models")
    tiny_unet().save_pretrained(path / "unet")
    tiny_dit().save_pretrained(path / "dit")
    return path


@pytest.fixture(scope="module")
def solver_file(folder) -> Path:
    out = folder / "solver.safetensors"
    assert run("calibrate", folder / "unet", "--out", out, "--method", "minmax", *QUICK, "--json") == 0
    return out


def make_plan(solver: PrecisionSolver, **changes) -> Plan:
    schedule = {"T": 1000, "betas_hash": "x", "prediction_type": "epsilon"}
    values = {"timesteps": (0, 9, 200), "bits": random_mixture(solver, 0), "model": {"hash": solver.model_hash}}
    return Plan(**{"schedule": schedule, **values, **changes})


def test_calibrate_and_export(folder, solver_file, tmp_path, capsys):
    model = load_model(folder / "unet")
    solver, plan = PrecisionSolver.load(solver_file, model), tmp_path / "plan.json"
    make_plan(solver).save(plan)
    arguments = ["export", plan, "--model", folder / "unet", "--solver", solver_file, "--json"]
    capsys.readouterr()
    assert run(*arguments, "--out", tmp_path / "packed") == 0
    result = json.loads(capsys.readouterr().out)
    assert (
        result["largest difference to the simulated network"] == 0 and result["bytes"] < result["bytes in float32"] / 3
    )
    assert json.loads((tmp_path / "packed" / "config.json").read_text())["timesteps"] == [0, 9, 200]
    assert run(*arguments, "--out", tmp_path / "ao", "--to", "torchao") == 0
    assert json.loads((tmp_path / "ao" / "torchao.json").read_text())["format"] == "tmpqdm-torchao"


def test_class_conditional(folder, tmp_path, capsys):
    out, data = tmp_path / "dit.safetensors", tmp_path / "data.npz"
    arguments = ["calibrate", folder / "dit", "--out", out, "--method", "minmax", *QUICK, "--save-data", data, "--json"]
    assert run(*arguments) == 2
    assert "labels: found none" in capsys.readouterr().err
    assert run(*arguments, "--labels", "1", "2", "--guidance", "2", "--no-resume") == 0
    assert json.loads(capsys.readouterr().out)["samples"] == 24
    again = tmp_path / "again.safetensors"
    assert run("calibrate", folder / "dit", "--out", again, "--data", data, "--method", "minmax", *QUICK, "--pin",
               "first=8", "--softmax-bits", "0", "--json") == 0  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "x.pt"], "name of the output"),
        (["--out", "x.safetensors", "--pin", "conv_in"], "--pin"),
        (["--out", "x.safetensors", "--bits", "8", "8"], "bits"),
        (["--out", "x.safetensors", "--data", "nothing.npz"], "nothing.npz"),
        (["--out", "x.safetensors", "--samples", "2", "--steps", "4", "--use", "2"], "a batch of 32"),
        (["--out", "x.safetensors", "--timesteps", "5", "3"], "timesteps"),
    ],
)
def test_wrong_input(folder, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert run("calibrate", folder / "unet", *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x.safetensors").exists()


def test_wrong_plans(folder, solver_file, tmp_path, capsys):
    solver, plan = PrecisionSolver.load(solver_file, load_model(folder / "unet")), tmp_path / "plan.json"
    arguments = ["export", plan, "--model", folder / "unet", "--solver", solver_file, "--out", tmp_path / "out"]
    bits = random_mixture(solver, 0)
    for changes, message in (
        ({"model": {"hash": "other"}}, "model: found weights with hash"),
        ({"bits": {"conv_in": {"w": 8, "a": 8}}}, "found no"),
        ({"per_step_bits": tuple({"timestep": t, "bits": bits} for t in (0, 9, 200))}, "per_step_bits"),
    ):
        make_plan(solver, **changes).save(plan)
        assert run(*arguments) == 2
        assert message in capsys.readouterr().err
    plan.write_text("[]")
    assert run(*arguments) == 2 and "format" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert parse_pins(("a=b=4",)) == {"a=b": 4}


def test_models_from_files(folder, tmp_path):
    unet = load_model(folder / "unet")
    weights = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert torch.equal(unet.conv_in.weight, weights["conv_in.weight"])
    single = tmp_path / "unet.safetensors"
    single.write_bytes((folder / "unet" / "diffusion_pytorch_model.safetensors").read_bytes())
    config = json.loads((folder / "unet" / "config.json").read_text())
    (tmp_path / "unet.json").write_text(json.dumps({"config": config}))
    assert torch.equal(load_model(single).conv_in.weight, weights["conv_in.weight"])
    (tmp_path / "unet.json").write_text(json.dumps({"config": config | {"_class_name": "VAE"}}))
    with pytest.raises(InputError, match="_class_name: found VAE"):
        load_model(single)
    with pytest.raises(InputError, match="model: found nothing"):
        load_model(tmp_path / "absent")
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text('{"beta_end": 0.01, "clip_sample": true}')
    assert load_scheduler(tmp_path).config.beta_end == 0.01 and load_scheduler(folder).config.beta_end == 0.02


def test_the_cifar10_transformer():
    file = Path(__file__).parents[4] / "shared" / "data" / "weights" / "cifar10_dit_w256_d8_h4_p4.safetensors"
    if not file.exists():
        pytest.skip(f"{file.name} is not beside the repository")
    model = load_model(file)
    data = collect_calibration(model, load_scheduler(file), samples=2, timesteps=[10, 500], labels=[0, 1])
    solver = PrecisionSolver.from_model(model, bits=(8, 4))
    solver.calibrate(data, method="minmax", batch_size=2)
    errors = [max(solver.errors(data, solver.uniform(bits), batch_size=2).values()) for bits in solver.bits]
    assert len(solver.splits) == 0 and errors[0] < 0.1 < errors[1]


def test_a_killed_calibration_goes_on_to_the_same_file(folder, tmp_path):
    """kill -9 in the middle, the same command again: the same bytes as without."""
    code = "import sys; from papercore import cli; from tmpqdm.commands.solver import Calibrate; " \
           "sys.exit(cli.main('tmpqdm', {'calibrate': Calibrate}, '', sys.argv[1:]))"  # fmt: skip
    options = [*QUICK[:-3], "--bits", "4", "--weight-iters", "3", "--act-iters", "2"]

    def command(out: Path) -> list[str]:
        return [sys.executable, "-c", code, "calibrate", str(folder / "unet"), "--out", str(out), *options]

    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    out = tmp_path / "killed.safetensors"
    process = subprocess.Popen(command(out), env=environment, stderr=subprocess.PIPE, text=True)
    units = tmp_path / "killed.run" / "units"
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline and len(list(units.glob("*.safetensors"))) < 10:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not out.exists() and len(list(units.glob("*.safetensors"))) >= 10
    whole = tmp_path / "whole.safetensors"
    for path in (out, whole):
        assert run(*command(path)[3:]) == 0
    assert out.read_bytes() == whole.read_bytes()
    assert not list(units.glob("*.safetensors"))
