"""The command line from end to end on digits, and several processes."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from dpk.cli import COMMANDS
from dpk.commands.options import make_network, parse_pairs, parse_settings
from dpk.data import Normalise, augment, read
from dpk.digits import digits_net
from dpk.recipe import Solver, make_method, read_recipe
from dpk.teacher_selection import rank_agreement
from papercore import cli
from papercore.errors import InputError
from papercore.weights import read_tensors
from PIL import Image
from safetensors.torch import save_file


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teachers")
    for size in ("small", "large"):
        save_file(digits_net(size, 1).state_dict(), folder / f"{size}.safetensors")
    return folder


def call(capsys, *arguments) -> dict:
    code = cli.main("dpk", COMMANDS, "", [*map(str, arguments), "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    return json.loads(out)


TRAIN = ("--student", "digits_student", "--teacher", "digits_small", "--epochs", 1, "--device", "cpu")


def test_train_evaluate_and_resume(capsys, tmp_path, teachers):
    out = tmp_path / "run"
    arguments = ("train", *TRAIN, "--teacher-weights", teachers / "small.safetensors", "--out", out)
    arguments += ("--set", "dim=16", "heads=2", "stages=1")
    trained = call(capsys, *arguments)
    assert trained["pairs"] == ["stage2 = stage2"]
    measured = call(capsys, "evaluate", out, "--network", "digits_student", "--device", "cpu")
    assert measured["top-1"] == trained["top-1 (last epoch)"]
    assert measured["pictures"] == 359
    assert call(capsys, *arguments)["top-1 (last epoch)"] == trained["top-1 (last epoch)"]
    assert cli.main("dpk", COMMANDS, "", [*map(str, arguments), "--seed", "1"]) == 2
    assert "another run" in capsys.readouterr().err


def test_select_teacher_ranks_the_candidates(capsys, tmp_path, teachers):
    arguments = ("select-teacher", "--student", "digits_student", "--out", tmp_path, "--epochs", 1, "--device", "cpu")
    arguments += ("--set", "dim=16", "heads=2", "stages=1", "--teachers")
    arguments += tuple(f"digits_{size}={teachers / size}.safetensors" for size in ("small", "large"))
    found = call(capsys, *arguments)
    accuracies = [row["student top-1"] for row in found["teachers"]]
    assert len(accuracies) == 2
    assert accuracies == sorted(accuracies, reverse=True)
    assert {"rho at last", "gap"} <= set(found["teachers"][0])
    assert (tmp_path / "report.html").exists()
    assert rank_agreement([1, 2, 3], [10, 30, 20]) == pytest.approx(0.5)
    assert rank_agreement([1, 2], [5, 5]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "--out", "o"), "--student: found nothing"),
        (("train", "--out", "o", *TRAIN), "method dpk: found no trained teacher"),
        (("train", "--out", "o", "--student", "resnet20", "--method", "ce"), "network: found resnet20"),
        (("train", "--out", "o", *TRAIN, "--set", "rho=1"), "option rho of dpk: found a name that does not exist"),
        (("train", "--out", "o", *TRAIN, "--pairs", "a=b@c"), "--pairs: found a=b@c"),
        (("train", "--out", "o", "--recipe", "nothing"), "recipe: found nothing"),
        (("train", "--out", "o", *TRAIN, "--epochs", 0), "epochs, batch_size"),
        (("evaluate", "missing.safetensors", "--network", "digits_student"), "missing.safetensors: weights"),
        (("select-teacher", "--student", "a", "--out", "o", "--teachers", "a"), "--teachers: found"),
    ],
)
def test_wrong_options_are_told_in_a_line(capsys, tmp_path, monkeypatch, arguments, message, teachers):
    monkeypatch.chdir(tmp_path)
    arguments = list(map(str, arguments))
    if "--epochs" in arguments and arguments[-2:] == ["--epochs", "0"]:
        arguments += ["--teacher-weights", str(teachers / "small.safetensors")]
    assert cli.main("dpk", COMMANDS, "", arguments) == 2
    assert message in capsys.readouterr().err


def test_texts_of_options():
    assert parse_settings(["ratio=dynamic", "weight=1e-3", "ratios=[0.5, 0, 3]", "a=true"]) == {
        "ratio": "dynamic",
        "weight": 0.001,
        "ratios": [0.5, 0, 3],
        "a": True,
    }
    assert parse_pairs(["a", "b=c@2"]) == [
        {"student": "a", "teacher": "a", "patch": None},
        {"student": "b", "teacher": "c", "patch": 2},
    ]
    for wrong in (["x"], ["a=1", "a=2"], ["a=[1"]):
        with pytest.raises(InputError, match="--set"):
            parse_settings(wrong)
    with pytest.raises(InputError, match="found digits_student, expected one for 3 channels"):
        make_network("digits_student", 10, 3, 0)
    assert torch.equal(*(make_network("digits_large", 10, 1, 4).head.weight for _ in range(2)))


def test_recipes_are_read_and_checked(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(
        "student: resnet20\nteacher: resnet56\noptions: {ratio: 0.25}\n"
        "pairs: [{student: layer2, teacher: layer2, patch: 2}]\nsolver: {epochs: 3, milestones: [1, 2]}\n"
    )
    recipe = read_recipe(path)
    method = recipe.build_method()
    assert (method.share, method.pairs[0].patch) == (0.25, 2)
    config = recipe.solver.config(640, 7)
    assert (config.steps, config.milestones, config.seed) == (30, (10, 20), 7)
    path.write_text("student: resnet20\nsolver: {epoch: 3}\n")
    with pytest.raises(InputError, match=r"solver.*field epoch.*did you mean epochs"):
        read_recipe(path)
    with pytest.raises(InputError, match="method: found none"):
        make_method("none", {})
    assert Solver().config(50_000, 0).steps == 240 * 781


def test_pictures_from_all_sources(tmp_path):
    for part in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / part / name).mkdir(parents=True)
            Image.new("RGB", (12, 10), (200, 0, 0)).save(tmp_path / part / name / "a.png")
    found = read("folder", tmp_path, "test", size=8)
    assert (found.images.shape, found.labels.tolist(), found.names) == ((2, 8, 8, 3), [0, 1], ["cat", "dog"])
    Image.new("RGB", (9, 9)).save(tmp_path / "train" / "cat" / "b.png")
    with pytest.raises(InputError, match=r"b.png: size"):
        read("folder", tmp_path, "train")
    (tmp_path / "val" / "dog" / "a.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"a.png: picture"):
        read("folder", tmp_path, "test")
    x, y = np.zeros((5, 4, 4, 3), np.uint8), np.arange(5)
    np.savez(tmp_path / "train.npz", x=x, y=y)
    assert read("npz", tmp_path, "train").classes == 5
    for wrong in ({"x": x}, {"x": x.astype(np.float32), "y": y}, {"x": x, "y": y[:4]}, {"x": x, "y": y - 1}):
        np.savez(tmp_path / "test.npz", **wrong)
        with pytest.raises(InputError, match=r"test.npz"):
            read("npz", tmp_path, "test")
    record = np.arange(2 * 3073, dtype=np.int64).astype(np.uint8).reshape(2, 3073)
    record[:, 0] = (3, 9)
    record.tofile(tmp_path / "test_batch.bin")
    found = read("cifar10", tmp_path, "test")
    assert found.labels.tolist() == [3, 9]
    assert torch.equal(found.images[0, :, :, 1].flatten(), torch.from_numpy(record[0, 1 + 1024 : 1 + 2048]))
    (tmp_path / "test_batch.bin").write_bytes(b"x" * 10)
    with pytest.raises(InputError, match="records of 3073 bytes"):
        read("cifar10", tmp_path, "test")
    (tmp_path / "data_batch_1").write_bytes(b"pickle")
    with pytest.raises(InputError, match="pickles run code"):
        read("cifar10", tmp_path, "train")
    with pytest.raises(InputError, match="--data"):
        read("npz", None, "train")


def test_augmentation_shifts_and_mirrors():
    x = torch.arange(1, 37, dtype=torch.float32).view(1, 1, 6, 6).expand(200, 1, 6, 6)
    out = augment(x, 1, True, torch.Generator().manual_seed(0))
    expected = set()
    for image in (x[0, 0], x[0, 0].flip(1)):
        padded = torch.nn.functional.pad(image, (1, 1, 1, 1))
        expected |= {tuple(padded[i : i + 6, j : j + 6].flatten().tolist()) for i in range(3) for j in range(3)}
    assert {tuple(image.flatten().tolist()) for image in out} == expected
    images = torch.randint(256, (2, 4, 4, 3), dtype=torch.uint8)
    made = Normalise((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))(images, None)
    plain = images.permute(0, 3, 1, 2) / 255 - torch.tensor([0.5, 0.4, 0.3])[:, None, None]
    torch.testing.assert_close(made, plain / torch.tensor([0.2, 0.3, 0.4])[:, None, None], rtol=1e-5, atol=1e-5)


PROCESS = """
import sys, warnings
from pathlib import Path
import torch
from dpk import DPK, Distiller, train
from dpk.digits import digits_net
from papercore.training import TrainConfig
from torch.utils.data import TensorDataset

torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
data = TensorDataset(torch.randn(32, 1, 8, 8, generator=generator), torch.arange(32) % 10)
method = DPK(dim=16, heads=2, stages=1, momentum=0.5)
d = Distiller(digits_net("student", 0), digits_net("small", 1), method, torch.zeros(2, 1, 8, 8))
config = TrainConfig(steps=4, batch_size=16, learning_rate=0.05, optimizer="sgd", checkpoint_every=2)
result = train(d, data, config, Path(sys.argv[1]), test=data, device="cpu")
value = method.gap.smoothed.clone()
both = [torch.zeros_like(value) for _ in range(2)]
torch.distributed.all_gather(both, value)
assert torch.equal(*both), both
torch.distributed.destroy_process_group()
"""


def test_two_processes_agree_on_the_ratio(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(PROCESS)
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(script), str(tmp_path / "out")], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "integrators.0.output.weight" in read_tensors(tmp_path / "out" / "aux.safetensors")
    assert len((tmp_path / "out" / "log.jsonl").read_text().splitlines()) == 2
