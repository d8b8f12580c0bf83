"""Training: optimiser, exact resume, what is wrong with data, what goes into the log."""

import copy
import dataclasses
import json

import pytest
import torch
from oneshot_mpq import Supernet, TrainConfig, fit
from oneshot_mpq.batchnorm import BatchNormBank
from oneshot_mpq.lsq import LSQ
from oneshot_mpq.optimizer import SandwichOptimizer
from oneshot_mpq.sandwich import Sandwich
from oneshot_mpq.validation import accuracies
from papercore.errors import WorkError
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, WeightedRandomSampler

from .conftest import Small

CONFIG = TrainConfig(
    epochs=10,
    warmup_epochs=1,
    learning_rate=0.2,
    step_learning_rate=1e-3,
    ema=0.9,
    checkpoint_every=5,
    log_every=4,
    batch_size=16,
    seed=3,
)


def data(count: int = 48) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 10
    means = 2 * torch.randn(10, 3, 1, 1, generator=generator)
    return TensorDataset(means[labels] + 0.5 * torch.randn(count, 3, 10, 10, generator=generator), labels)


def fresh(**options) -> Supernet:
    torch.manual_seed(0)
    return Supernet(Small(), data().tensors[0][:2], **options)


def same(first: nn.Module, second: nn.Module) -> bool:
    other = second.state_dict()
    return all(torch.equal(value, other[name]) for name, value in first.state_dict().items())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A training without interruption, watched."""
    out = tmp_path_factory.mktemp("whole")
    result = fit(fresh(), data(), CONFIG, val_loader=DataLoader(data(20), 10), out=out, device="cpu")
    return result, out


def test_it_learns_and_hands_out_the_average_on_the_cpu(whole):
    result, out = whole
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert result.steps == 30 and lines[-1]["step"] == 30
    assert lines[-1]["loss"] < 0.7 * lines[0]["loss"]
    assert lines[-1]["frozen"] == 1  # one event, at epoch 7: floor(0.47 x 3 layers)
    assert {"ce", "kl", "idm", "turbulence", "oscillation W2", "accuracy W6A6", "lifted_steps"} <= set(lines[-1])
    assert not result.net.training and result.net.calibrated
    assert sum(len(layer.allowed_weight_bits) < len(layer.weight_choices) for layer in result.net.layers.values()) == 1


class Stop(Exception):
    pass


@pytest.mark.parametrize("stop", [6, 23])
def test_stopped_and_started_again_it_gives_the_same_bits(whole, tmp_path, stop, monkeypatch):
    """Stopped before and after the candidate sets changed, between two checkpoints."""
    after_step = Sandwich.after_step

    def stopping(self, model, step):
        if step == stop:
            raise Stop
        return after_step(self, model, step)

    loader = DataLoader(data(20), 10)
    with monkeypatch.context() as patched:
        patched.setattr(Sandwich, "after_step", stopping)
        with pytest.raises(Stop):
            fit(fresh(), data(), CONFIG, val_loader=loader, out=tmp_path, device="cpu")
    torch.manual_seed(99)  # what the process drew before must not matter
    again = fit(fresh(), data(), CONFIG, val_loader=loader, out=tmp_path, device="cpu")
    result, out = whole
    assert same(result.net, again.net)
    lines, expected = (
        [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()] for folder in (tmp_path, out)
    )
    assert lines == expected
    ours, theirs = (load_file(folder / "checkpoint.safetensors") for folder in (tmp_path, out))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    finished = fit(fresh(), data(), CONFIG, val_loader=loader, out=tmp_path, device="cpu")
    assert same(result.net, finished.net)


def test_another_configuration_does_not_go_on_in_the_folder(whole):
    _, out = whole
    with pytest.raises(ValueError, match=r"method\.idm"):
        fit(fresh(), data(), dataclasses.replace(CONFIG, idm=0.0), out=out, device="cpu")


def test_a_damaged_checkpoint_is_named(whole, tmp_path):
    _, out = whole
    (tmp_path / "config.json").write_bytes((out / "config.json").read_bytes())
    (tmp_path / "checkpoint.safetensors").write_bytes((out / "checkpoint.safetensors").read_bytes()[:500])
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors: damaged checkpoint"):
        fit(fresh(), data(), CONFIG, out=tmp_path, device="cpu", val_loader=DataLoader(data(20), 10))


def test_micro_batches_and_the_remedies_can_be_combined():
    for changes in ({"accumulate": 2}, {"idm": 0.0, "scheduler": False}, {"paths": 0}, {"paths": 1, "clip": None}):
        config = dataclasses.replace(CONFIG, epochs=2, **changes)
        assert fit(fresh(), data(), config, device="cpu").loss > 0
    bf16 = fit(fresh(), data(), dataclasses.replace(CONFIG, epochs=2, mixed_precision="bf16"), device="cpu")
    assert torch.isfinite(torch.tensor(bf16.loss))


def test_dampening_is_used_after_its_epoch(tmp_path):
    config = dataclasses.replace(CONFIG, epochs=4, dampening_start=1, log_every=1)
    fit(fresh(), data(), config, out=tmp_path, device="cpu")
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert ["dampening" in line for line in lines] == [line["step"] > 6 for line in lines]


def test_a_teacher_guides_the_largest_path():
    torch.manual_seed(1)
    teacher = Small()
    images, labels = data().tensors
    method = Sandwich(fresh(), CONFIG, 3, teacher)
    method.net.calibrate(images)
    method.begin_step(method.net, 0)
    first = next(method.losses(method.net, (images, labels), torch.Generator()))
    terms = method.terms[0]
    torch.testing.assert_close(first.detach(), (terms["ce"] + terms["kl"]) / 2)
    assert not any(p.requires_grad for p in teacher.parameters())


def test_only_outputs_that_are_compared_are_kept():
    images, labels = data().tensors
    net = fresh()
    net.calibrate(images)
    method = Sandwich(net, CONFIG, 3)
    method.begin_step(net, 0)
    path = method.paths[0]
    method.paths = [path._replace(weight_bits=(2, 5, 5)), path._replace(weight_bits=(4, 4, 4))]
    method.passes = 3
    kept = []
    take = net.features.take

    def noting(name, value):
        if name in net.features.wanted:
            kept.append(name)
        take(name, value)

    net.features.take = noting
    for loss in method.losses(net, (images, labels), torch.Generator()):
        loss.backward()
    assert kept == ["a", "a"]
    assert "idm" in method.terms[1] and "idm" not in method.terms[2]


def bad(images=None, labels=None, batch_size=16, dataset=None):
    x, y = data().tensors
    given = dataset or TensorDataset(x if images is None else images, y if labels is None else labels)
    return given, dataclasses.replace(CONFIG, batch_size=batch_size, epochs=2)


class Stream(IterableDataset):
    def __iter__(self):
        return iter([])


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (bad(torch.empty(0, 3, 10, 10), torch.empty(0, dtype=torch.long)), "no sample"),
        (bad(labels=torch.full((48,), 10)), "labels: found 10 to 10, expected 0 to 9"),
        (bad(labels=torch.full((48,), -1)), "labels: found -1 to -1"),
        (bad(labels=torch.zeros(48)), "class number"),
        (bad(batch_size=1), "batch_size: found 1"),
        (bad(images=torch.full((48, 3, 10, 10), float("nan"))), "input of a: found NaN"),
        (bad(dataset=Stream()), "without length"),
        (bad(batch_size=None), "batch_size"),
    ],
)
def test_wrong_data_stops_before_the_training(case, message):
    with pytest.raises(ValueError, match=message):
        fit(fresh(), *case, device="cpu")


def test_loaders_that_do_more_than_shuffle_are_refused():
    sampler = WeightedRandomSampler([1.0] * 48, 48)
    with pytest.raises(ValueError, match="WeightedRandomSampler"):
        fit(fresh(), DataLoader(data(), 16, sampler=sampler), CONFIG, device="cpu")
    with pytest.raises(ValueError, match="collate_fn"):
        fit(fresh(), DataLoader(data(), 16, collate_fn=list), CONFIG, device="cpu")


def test_a_loader_gives_its_batch_size():
    config = dataclasses.replace(CONFIG, batch_size=None, epochs=2)
    assert fit(fresh(), DataLoader(data(), 12, shuffle=True), config, device="cpu").steps == 8


class LateNaN(TensorDataset):
    """Not a number from some access on."""

    def __init__(self, *tensors, kind):
        super().__init__(*tensors)
        self.count, self.kind = 0, kind

    def __getitem__(self, index):
        self.count += 1
        x, y = super().__getitem__(index)
        if self.count > 48 + 40:
            return (x * float("nan"), y) if self.kind == "image" else (x, y + 50)
        return x, y


def test_images_and_labels_that_go_wrong_later_are_named_with_their_step():
    for kind, message in (
        ("image", "images of step 2: found NaN"),
        ("label", "labels of step 2: found .* expected 0 to 9"),
    ):
        with pytest.raises(ValueError, match=message):
            fit(fresh(), LateNaN(*data().tensors, kind=kind), CONFIG, device="cpu")


def test_a_diverging_training_names_layer_and_step():
    config = dataclasses.replace(CONFIG, learning_rate=1e30, warmup_epochs=0, clip=None, step_learning_rate=0.0)
    with pytest.raises(WorkError, match=r"at step \d+"):
        fit(fresh(), data(), config, device="cpu")
    net = fresh()
    net.calibrate(data().tensors[0])
    for large in (net.layers["p"].weight, net.layers["p"].weight_quantizer.steps):
        large.data.fill_(3e38)
    method = Sandwich(net, CONFIG, 3)
    method.begin_step(net, 7)
    with pytest.raises(WorkError, match="the largest path is nan at step 7: the output of p at W6A6 is not finite"):
        next(method.losses(net, data().tensors, torch.Generator()))
    net = fresh()
    net.calibrate(data().tensors[0])
    net.layers["d"].act_quantizer.steps.data[1] = float("nan")
    method = Sandwich(net, CONFIG, 3)
    method.begin_step(net, 4)
    with pytest.raises(WorkError, match="step 4: the 4-bit activation step of d is not finite"):
        method.after_step(net, 4)


def test_steps_that_fall_below_zero_are_lifted_and_counted(tmp_path):
    config = dataclasses.replace(CONFIG, step_learning_rate=5.0, epochs=2, log_every=1)
    result = fit(fresh(), data(), config, out=tmp_path, device="cpu")
    assert all((m.steps > 0).all() for m in result.net.modules() if isinstance(m, LSQ))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["lifted_steps"] > 0


@pytest.mark.parametrize(
    "changes",
    [{"epochs": 0}, {"paths": -1}, {"warmup_epochs": 10}, {"idm": -1.0}, {"label_smoothing": 1.0}, {"calibration": 0}],
)
def test_wrong_settings_are_named(changes):
    with pytest.raises(ValueError, match=f"field {next(iter(changes))}"):
        dataclasses.replace(CONFIG, **changes)


def test_the_optimiser_moves_every_row_as_a_parameter_of_its_own():
    """Against torch's SGD and Adam over separate parameters, which skip those without gradient."""
    net = fresh()
    net.calibrate(data().tensors[0])
    optimizer = SandwichOptimizer(net, 0.1, 0.01, weight_decay=0.5)
    rows = [m.steps for m in net.modules() if isinstance(m, LSQ)]
    for p in rows:
        p.data.fill_(1.0)  # far from the floor
    banks = [m for m in net.modules() if isinstance(m, BatchNormBank)]
    banked = [p for bank in banks for p in (bank.weight, bank.bias)]
    known = {id(p) for p in (*rows, *banked)}
    rest = [p for p in net.parameters() if id(p) not in known]
    split = {id(p): [nn.Parameter(row.detach().clone()) for row in p] for p in (*rows, *banked)}
    copies = {id(p): nn.Parameter(p.detach().clone()) for p in rest}
    sgd = torch.optim.SGD(
        [
            {"params": [copies[id(p)] for p in rest if p.ndim == 4], "weight_decay": 0.5},
            {"params": [copies[id(p)] for p in rest if p.ndim != 4]},
            {"params": [row for p in banked for row in split[id(p)]]},
        ],
        lr=0.1,
        momentum=0.9,
        nesterov=True,
    )
    adam = torch.optim.Adam([row for p in rows for row in split[id(p)]], lr=0.01)
    generator = torch.Generator().manual_seed(5)
    for _ in range(12):
        for p in rest:
            p.grad = torch.randn(p.shape, generator=generator)
            copies[id(p)].grad = p.grad.clone()
        for p in (*rows, *banked):
            used = torch.rand(len(p), generator=generator) < 0.5
            p.grad = torch.randn(p.shape, generator=generator) * used.reshape(-1, *[1] * (p.ndim - 1))
            for row, gradient, there in zip(split[id(p)], p.grad, used, strict=True):
                row.grad = gradient.clone() if there else None
        optimizer.step()
        sgd.step()
        adam.step()
    for p in rest:
        torch.testing.assert_close(p, copies[id(p)])
    for p in (*rows, *banked):
        torch.testing.assert_close(p.detach(), torch.stack([row.detach() for row in split[id(p)]]))


def test_measuring_accuracy_changes_nothing():
    net = fresh()
    net.calibrate(data().tensors[0])
    before = copy.deepcopy(net.state_dict())
    net.train().select([3, 4, 5], [2, 3, 4])
    found = accuracies(net, DataLoader(data(), 16))
    assert set(found) == {2, 3, 4, 5, 6} and all(0 <= value <= 100 for value in found.values())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert net.training and [layer.weight_bits for layer in net.layers.values()] == [3, 4, 5]
