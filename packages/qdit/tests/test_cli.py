"""Every command from one end to the other on a tiny model, and what wrong input gets."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from qdit.cli import COMMANDS, main
from qdit.pipeline import WEIGHTS
from safetensors.torch import load_file, save_file


def qdit(*arguments: object) -> int:
    sys.argv = ["qdit", *map(str, arguments)]
    return main()


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "model"
    assert qdit("train", "--out", out, "--steps", 30, "--width", 16, "--depth", 2, "--device", "cpu") == 0
    return out


def test_the_whole_way(trained, tmp_path, capsys):
    assert qdit("train", "--out", trained, "--steps", 30, "--width", 16, "--depth", 2, "--device", "cpu", "--json") == 0
    assert json.loads(capsys.readouterr().out)["parameters"] > 0
    calibration = tmp_path / "c.safetensors"
    assert qdit("calibrate", trained, "--out", calibration, "--samples", 32, "--steps", 5) == 0
    packed = tmp_path / "w4a8"
    options = ("--group-size", 8, "--calibration", calibration, "--out", packed)
    assert qdit("quantize", trained, *options) == 0
    text = capsys.readouterr().out
    assert "transformer_blocks.0.attn1.qkv" in text
    assert "gptq" in text
    assert "proj_out_1" in text
    for name, folder in (("full", trained), ("packed", packed)):
        assert qdit("sample", folder, "--out", tmp_path / f"{name}.npz", "--count", 30, "--steps", 4) == 0
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    distances = []
    for arguments in ((), ("--features", "pixels"), ("--reference", tmp_path / "full.npz")):
        assert qdit("evaluate", tmp_path / "packed.npz", "--json", *arguments) == 0
        distances.append(json.loads(capsys.readouterr().out)["frechet_distance"])
    assert distances[2] < distances[0]


def test_a_reloaded_model_samples_the_same_bits_in_another_process(trained, tmp_path):
    packed = tmp_path / "packed"
    assert qdit("quantize", trained, "--no-gptq", "--wbits", 8, "--group-size", "row", "--out", packed) == 0
    assert qdit("sample", packed, "--out", tmp_path / "here.npz", "--count", 2, "--steps", 3, "--device", "cpu") == 0
    command = [sys.executable, "-m", "qdit.cli", "sample", str(packed), "--out", str(tmp_path / "there.npz")]
    subprocess.run([*command, "--count", "2", "--steps", "3", "--device", "cpu"], check=True)
    with np.load(tmp_path / "here.npz") as here, np.load(tmp_path / "there.npz") as there:
        assert np.array_equal(here["arr_0"], there["arr_0"])


def test_plans_and_static_ranges_on_the_command_line(trained, tmp_path):
    plan = tmp_path / "plan.json"
    plan.write_text('{"*.attn1.qkv": {"group_size": 4, "act_granularity": "sample"}, "*": "row"}')
    settings = tmp_path / "settings.yaml"
    settings.write_text(f"wbits: 6\ngptq: false\ngroup_sizes: {plan}\n")
    assert qdit("quantize", trained, "--config", settings, "--out", tmp_path / "a") == 0
    config = json.loads((tmp_path / "a" / "config.json").read_text())["quantization_config"]
    assert config["wbits"] == 6
    assert config["group_sizes"]["transformer_blocks.1.attn1.qkv"] == 4
    assert config["group_sizes"]["transformer_blocks.1.ff.net.2"] == 64
    assert config["act_granularity"]["transformer_blocks.0.attn1.qkv"] == "sample"
    static = ("--act", "static", "--no-gptq", "--group-size", 16)
    assert qdit("quantize", trained, *static, "--out", tmp_path / "b") == 0
    assert any(name.endswith("act_scale") for name in load_file(tmp_path / "b" / WEIGHTS))


def broken(trained: Path, tmp_path: Path, change) -> Path:
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "config.json").write_bytes((trained / "config.json").read_bytes())
    tensors = load_file(trained / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    return folder


def test_wrong_input_is_one_line_and_exit_code_2(trained, tmp_path, capsys):
    nan = broken(trained, tmp_path, lambda t: t["proj_out_2.bias"].fill_(torch.nan))
    torn = tmp_path / "torn"
    torn.mkdir()
    (torn / "config.json").write_bytes((trained / "config.json").read_bytes())
    (torn / WEIGHTS).write_bytes((trained / WEIGHTS).read_bytes()[:1000])
    plan, yaml = tmp_path / "plan.json", tmp_path / "c.yaml"
    plan.write_text('{"transformer_blocks.7.attn1.qkv": 4, "*": 8}')
    yaml.write_text("wbits: four\n")
    notes = tmp_path / "notes.npz"
    notes.write_text("no archive")
    quantize = ("quantize", trained, "--out", tmp_path / "q")
    cases = (
        ((*quantize, "--bits", 4), ("--bits",)),
        ((*quantize, "--group-sizes", plan), ("plan.json", "transformer_blocks.7.attn1.qkv", "no layer of that name")),
        ((*quantize, "--group-size", 0), ("group_size", "found 0", "at least 1")),
        ((*quantize, "--group-size", 500), ("group size of layer transformer_blocks.0.attn1.qkv", "found 500")),
        ((*quantize, "--wbits", 1), ("wbits", "found 1", "2 to 8")),
        ((*quantize, "--config", yaml), ("c.yaml", "field wbits", "'four'", "whole number")),
        ((*quantize, "--group-size", 8, "--calibration", notes), ("notes.npz", "calibration file")),
        (("quantize", nan, "--out", tmp_path / "q"), (WEIGHTS, "proj_out_2.bias", "4 values that are not finite")),
        (("sample", torn, "--out", tmp_path / "s.npz"), (WEIGHTS, "damaged weights")),
        (("sample", tmp_path / "absent", "--out", tmp_path / "s.npz"), ("absent", "config.json")),
        (("sample", trained, "--out", tmp_path / "s.npz", "--labels", "1,x"), ("--labels", "1,x")),
        (("sample", trained, "--out", tmp_path / "s.npz", "--labels", "12"), ("labels", "12..12", "0..10")),
        (("sample", trained, "--out", tmp_path / "s.npz", "--steps", "0"), ("--steps", "found 0")),
        (("sample", trained, "--out", tmp_path / "s.npz", "--count", "0"), ("--count", "found 0")),
        (("evaluate", notes), ("notes.npz", "cannot be read as .npz")),
        (("train", "--out", trained, "--width", 17), ("--width", "17")),
        (
            ("train", "--out", trained, "--steps", 31, "--width", 16, "--depth", 2),
            ("config.json", "field train.steps", "found 30", "expected 31"),
        ),
        (("quantize", trained, "--out", trained), ("--out", "another folder")),
        (("quantize", trained, "--out", notes), ("notes.npz", "is a file")),
        (("sample", trained, "--out", tmp_path / "s.png"), ("s.png", "expected .npz")),
        (("sample", trained, "--out", tmp_path), ("is a folder",)),
        (("sample", trained, "--out", tmp_path / "s.npz", "--guidance", "nan"), ("guidance", "nan")),
        (("sample", trained, "--out", tmp_path / "s.npz", "--labels", 10**20), ("--labels",)),
        (("train", "--out", notes), ("notes.npz", "is a file")),
        (("train", "--out", tmp_path / "t", "--heads", 0), ("--heads", "found 0")),
        (("train", "--out", tmp_path / "t", "--seed", 2**64), ("--seed",)),
        (("evaluate", tmp_path / "s.npz", "--features", ":x"), ("s.npz",)),
        (("reproduce", "--scale", "full"), ("--scale", "full", "tiny or small")),
        (("reproduce", "--scale", "small"), ("--data", "found nothing")),
        (("reproduce", "--scale", "small", "--data", tmp_path), ("cifar10_dit_w256_d8_h4_p4.json", "cannot be read")),
    )
    capsys.readouterr()
    for arguments, words in cases:
        assert qdit(*arguments) == 2, arguments
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("error: "), err
        assert err.count("\n") == 1, err
        for word in words:
            assert word in err, (arguments, err)
    assert not (tmp_path / "q").exists()


def test_help_is_quick_and_loads_no_torch():
    for command in ("--help", *[f"{name} --help" for name in COMMANDS]):
        begun = time.monotonic()
        code = "import sys, qdit.cli; code = qdit.cli.main(); assert 'torch' not in sys.modules; sys.exit(code)"
        done = subprocess.run(
            [sys.executable, "-c", code, *command.split()], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert "usage: qdit" in done.stdout
        assert time.monotonic() - begun < 10  # seconds even on a busy machine; normally well below one


def test_every_public_name_exists():
    import qdit as package

    for name in package.__all__:
        assert getattr(package, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = package.nothing
