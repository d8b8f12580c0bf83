"""The claims are judged by their criteria; the GPU tasks and the small scale run at tiny size."""

import dataclasses

import pytest
import torch
from dpk import reproduce, small
from dpk.gpu_tasks import tasks
from dpk.method import Method
from papercore.data.cifar_resnet import CifarResNet, resnet_file
from papercore.errors import InputError
from papercore.gpu import Request
from papercore.reproduce import Settings
from PIL import Image
from safetensors.torch import save_file


def runs(**changes) -> dict[str, list[reproduce.Run]]:
    found = {name: [reproduce.Run(75.0, 75.0, 0.5, 0.2)] * 3 for name in reproduce.ROWS}
    found["DPK, large teacher"] = [reproduce.Run(76.0, 76.0, 0.5, 0.3)] * 3
    for size in ("small", "large"):
        found[f"FitNet, {size} teacher"] = [reproduce.Run(74.0, 74.0, None, None)] * 3
    for name, change in changes.items():
        row = name.replace("_", " ").replace(" small", ", small").replace(" large", ", large")
        found[row] = [*found[row][:2], dataclasses.replace(found[row][2], **change)]
    return found


def verdicts(found) -> dict[str, bool]:
    return {claim.name: claim.holds for claim in reproduce.judge(found)}


def test_claims_hold_and_fail_by_their_criteria():
    assert verdicts(runs()) == dict.fromkeys(("C1", "C2", "C3", "C4", "C5"), True)
    assert not verdicts(runs(FitNet_small_teacher={"accuracy": 80.0}))["C1"]
    assert not verdicts(runs(**{"rho_0.5_large_teacher": {"accuracy": 79.0}}))["C2"]
    assert not verdicts(runs(DPK_small_teacher={"accuracy": 79.0}))["C3"]
    assert not verdicts(runs(DPK_small_teacher={"last": 0.6}))["C4"]
    assert not verdicts(runs(DPK_large_teacher={"last": 0.1}))["C4"]
    assert not verdicts(runs(DPK_large_teacher={"plain": 75.9}))["C5"]


def test_every_row_of_the_reproduction_can_be_made():
    for _, make in reproduce.ROWS.values():
        assert isinstance(make(), Method)
    table = reproduce.rows_table(runs())
    assert len(table.rows) == len(reproduce.ROWS)
    assert reproduce.accuracy_picture(runs()).png.startswith(b"\x89PNG")
    with pytest.raises(InputError, match="240 epochs"):
        reproduce.run(Settings("full", None, None, "cpu", 0, print))  # pyright: ignore[reportArgumentType]


@pytest.fixture
def data(tmp_path):
    """Untrained ResNets and two rows of noise pictures for each part."""
    for name in ("weights", "images/cifar10"):
        (tmp_path / name).mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for part in ("train", "test"):
        noise = torch.randint(256, (32, 3200, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(tmp_path / "images" / "cifar10" / f"{part}_00.png")
    for depth in small.TINY.teachers:
        torch.manual_seed(depth)
        save_file(CifarResNet(depth).state_dict(), resnet_file(tmp_path, depth))
    return tmp_path


def test_the_small_scale_runs_and_the_queue_takes_it(data):
    by_name = {task.name: task for task in tasks()}
    found = by_name["reproduce-small"].run(Request("cpu", True, data))
    assert [claim["name"] for claim in found["claims"]] == ["C1", "C2", "C3", "C4"]
    assert len(found["tables"]["students, top-1 after the last epoch"]) == 14
    with pytest.raises(InputError, match="--data"):
        small.run(Settings("small", data, None, "cpu", 0, print))


def test_the_checks_of_the_queue_run_on_the_cpu():
    for task in tasks():
        if not task.needs_data:
            assert task.run(Request("cpu", True, None))
