"""Training goes on to the same bits, its files load into a plain student, bad ones are refused whole."""

import copy
import json
import shutil

import pytest
import torch
from dpk import evaluate, train
from dpk.checkpoint import load, save
from dpk.distiller import Distiller
from dpk.dpk_method import DPK
from papercore import training as loop
from papercore.errors import InputError, WorkError
from papercore.training import TrainConfig
from papercore.weights import load_exactly, read_tensors
from torch.utils.data import TensorDataset

CONFIG = TrainConfig(
    steps=14, batch_size=8, learning_rate=0.05, optimizer="sgd", nesterov=True, clip_norm=5.0, checkpoint_every=4
)


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(40, 1, 8, 8, generator=generator), torch.arange(40) % 10)


@pytest.fixture
def make(net):
    def build(**given):
        method = DPK(**{"dim": 16, "heads": 2, "momentum": 0.9, "stages": 1, "warmup": 2, **given})
        return Distiller(net(6), net(8, seed=1), method, torch.zeros(2, 1, 8, 8), seed=5)

    return build


class StopError(Exception):
    pass


def noisy(images, generator):
    """An augmentation that draws."""
    return images if generator is None else images + 0.1 * torch.randn(images.shape, generator=generator)


def test_a_killed_training_goes_on_to_the_same_bits(make, data, tmp_path, monkeypatch):
    whole = train(make(), data, CONFIG, tmp_path / "whole", test=data, prepare=noisy, device="cpu")
    keep = loop.State.save

    def die(state, path, step):
        keep(state, path, step)
        if step == 8:
            raise StopError

    monkeypatch.setattr(loop.State, "save", die)
    with pytest.raises(StopError):
        train(make(), data, CONFIG, tmp_path / "parts", test=data, prepare=noisy, device="cpu")
    monkeypatch.undo()
    resumed = train(make(), data, CONFIG, tmp_path / "parts", test=data, prepare=noisy, device="cpu")
    for name in ("student.safetensors", "aux.safetensors", "state.json", "metrics.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes(), name
    logs = [[{k: v for k, v in r.items() if k != "seconds"} for r in result.records] for result in (whole, resumed)]
    assert logs[0] == logs[1]
    assert whole.best == resumed.best
    record = whole.records[1]
    assert {"loss.ce", "loss.feature.stage2", "rho.stage2", "cka.stage2", "gap.stage2", "top1", "seconds"} <= set(
        record
    )
    again = train(make(), data, CONFIG, tmp_path / "whole", test=data, prepare=noisy, device="cpu")
    assert again.last == whole.last
    with pytest.raises(InputError, match=r"field pairs|field method"):
        train(make(stages=2), data, CONFIG, tmp_path / "whole", device="cpu")


def test_the_student_loads_into_a_plain_one_and_scores_the_same(make, net, data, tmp_path):
    result = train(make(), data, CONFIG, tmp_path, test=data, device="cpu")
    plain = net(6, seed=7)
    load_exactly(plain, read_tensors(tmp_path / "student.safetensors"), tmp_path)
    assert evaluate(plain, data, device="cpu") == result.last
    assert json.loads((tmp_path / "metrics.json").read_text())["last"]["samples"] == 40
    assert len(result.records) == 3


def test_top_five_and_loss_of_a_classifier(data):
    class Fixed(torch.nn.Module):
        def forward(self, x):
            return torch.arange(10.0).expand(len(x), 10)

    metrics = evaluate(Fixed(), data, device="cpu", batch_size=7)
    assert (metrics.top1, metrics.top5, metrics.samples) == (10.0, 50.0, 40)
    expected = torch.nn.functional.cross_entropy(torch.arange(10.0).expand(40, 10), data.tensors[1])
    assert metrics.loss == pytest.approx(expected.item(), rel=1e-6)


def test_bad_data_is_refused_before_the_first_step(make, data, tmp_path):
    empty = TensorDataset(torch.zeros(0, 1, 8, 8), torch.zeros(0, dtype=torch.long))
    with pytest.raises(InputError, match="no sample"):
        train(make(), empty, CONFIG, tmp_path, device="cpu")
    beyond = TensorDataset(data.tensors[0], data.tensors[1] + 1)
    with pytest.raises(InputError, match="label: found 10, expected 0 to 9"):
        train(make(), beyond, CONFIG, tmp_path, device="cpu")
    with pytest.raises(InputError, match="label: found -1"):
        evaluate(make(), TensorDataset(data.tensors[0], data.tensors[1] - 1), device="cpu")
    assert not list(tmp_path.iterdir())
    bad = TensorDataset(torch.full((40, 1, 8, 8), torch.nan), data.tensors[1])
    with pytest.raises(WorkError, match="not finite"):
        train(make(), bad, CONFIG, tmp_path, device="cpu")


def steps(distiller, optimizer, batch, count):
    for _ in range(count):
        optimizer.zero_grad()
        distiller(*batch).total.backward()
        optimizer.step()


@pytest.mark.parametrize("optimizer", [lambda p: torch.optim.SGD(p, 0.05, 0.9), lambda p: torch.optim.AdamW(p, 1e-3)])
def test_an_own_loop_resumes_from_files(make, batch, tmp_path, optimizer):
    d = make()
    rule = optimizer(d.trainable_parameters())
    steps(d, rule, batch, 2)
    save(tmp_path, d, epoch=2, optimizer=rule)
    steps(d, rule, batch, 2)
    other = make()
    again = optimizer(other.trainable_parameters())
    assert load(tmp_path, other, optimizer=again) == 2
    steps(other, again, batch, 2)
    for name, value in d.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_damaged_or_foreign_files_change_nothing(make, net, batch, tmp_path):
    d = make()
    rule = torch.optim.SGD(d.trainable_parameters(), 0.05, 0.9)
    steps(d, rule, batch, 1)
    good = tmp_path / "good"
    save(good, d, epoch=1, optimizer=rule)
    before = copy.deepcopy(d.state_dict())

    def refused(change, message, target=d):
        folder = tmp_path / "bad"
        shutil.copytree(good, folder, dirs_exist_ok=True)
        change(folder)
        with pytest.raises(InputError, match=message):
            load(folder, target, optimizer=torch.optim.SGD(target.trainable_parameters(), 0.05, 0.9))
        shutil.rmtree(folder)

    def cut(name):
        return lambda folder: (folder / name).write_bytes((good / name).read_bytes()[:-9])

    def edit(**changes):
        def write(folder):
            state = json.loads((good / "state.json").read_text()) | changes
            (folder / "state.json").write_text(json.dumps(state))

        return write

    refused(cut("student.safetensors"), "student.safetensors: weights")
    refused(cut("aux.safetensors"), "aux.safetensors: weights")
    refused(cut("optimizer.safetensors"), "optimizer.safetensors: weights")
    refused(cut("state.json"), "state.json:.*not JSON")
    refused(lambda folder: (folder / "aux.safetensors").unlink(), "aux.safetensors")
    refused(edit(epoch="one"), "field epoch")
    refused(edit(generator={"device": "cpu", "state": "AAAA"}), "field generator")
    refused(edit(optimizer={}), "field optimizer")
    wide = Distiller(net(7), net(8, seed=1), DPK(dim=16, heads=2, stages=1), torch.zeros(2, 1, 8, 8))
    refused(
        lambda folder: None, r"student.safetensors: tensor head.weight: found shape \(10, 12\), expected .*14", wide
    )
    other = Distiller(net(6), net(9, seed=1), DPK(dim=16, heads=2, stages=1), torch.zeros(2, 1, 8, 8))
    kept = copy.deepcopy(other.state_dict())
    refused(lambda folder: None, r"aux.safetensors: tensor integrators.0", other)
    assert all(torch.equal(value, kept[name]) for name, value in other.state_dict().items())
    assert all(torch.equal(value, before[name]) for name, value in d.state_dict().items())
    save(tmp_path / "plain", d, epoch=1)
    with pytest.raises(InputError, match="no optimiser"):
        load(tmp_path / "plain", d, optimizer=rule)
