"""The training loop: schedules, accumulation, resume, and everything a wrong folder or file can do."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from papercore.errors import InputError, WorkError
from papercore.training import Method, StepSampler, TrainConfig, learning_rate, train
from torch import nn
from torch.utils.data import TensorDataset

X = torch.randn(50, 5, generator=torch.Generator().manual_seed(1))
Y = X @ torch.randn(5, 2, generator=torch.Generator().manual_seed(2))
SHORT = TrainConfig(steps=12, batch_size=8, learning_rate=1e-2, ema=0.9, checkpoint_every=4, log_every=3)


class Net(nn.Module):
    """With dropout and batch norm, so that random numbers and buffers matter."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(5, 16), nn.BatchNorm1d(16), nn.Linear(16, 2)

    def forward(self, x):
        return self.last(nn.functional.dropout(torch.relu(self.norm(self.first(x))), 0.2, self.training))


def build() -> Net:
    torch.manual_seed(0)
    return Net()


def loss(model, batch, generator):
    x, y = batch
    noise = 0.1 * torch.randn(x.shape, generator=generator, device=x.device)
    return (model(x + noise) - y).square().mean()


def fit(out: Path, config: TrainConfig = SHORT, **options):
    return train(build(), TensorDataset(X, Y), loss, config, out, device="cpu", **options)


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


class StoppedError(Exception):
    pass


def stopping(at: int):
    """A loss that dies at call number `at`, like a process that is killed in the middle of a step."""
    calls = 0

    def dying(model, batch, generator):
        nonlocal calls
        calls += 1
        if calls > at:
            raise StoppedError
        return loss(model, batch, generator)

    return dying


@pytest.mark.parametrize("at", [1, 4, 5, 11])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path, at, accumulate):
    config = dataclasses.replace(SHORT, accumulate=accumulate)
    whole = fit(tmp_path / "whole", config)
    with pytest.raises(StoppedError):
        train(build(), TensorDataset(X, Y), stopping(at * accumulate), config, tmp_path / "cut", device="cpu")
    resumed = fit(tmp_path / "cut", config)
    assert equal(whole.model, resumed.model)
    assert (tmp_path / "cut" / "log.jsonl").read_text() == (tmp_path / "whole" / "log.jsonl").read_text()
    assert (tmp_path / "cut" / "checkpoint.safetensors").read_bytes() == (
        tmp_path / "whole" / "checkpoint.safetensors"
    ).read_bytes()


def test_a_finished_run_is_only_loaded(tmp_path):
    first = fit(tmp_path)
    again = fit(tmp_path)
    assert equal(first.model, again.model)
    assert again.seconds < 1
    assert again.loss == first.loss


def test_the_average_is_what_is_returned(tmp_path):
    averaged = fit(tmp_path / "a").model
    last = fit(tmp_path / "b", dataclasses.replace(SHORT, ema=None)).model
    assert not equal(averaged, last)
    assert not averaged.training


def test_accumulation_equals_one_large_batch(tmp_path):
    """Without batch norm and noise the sum of micro-batches is the batch."""

    def plain(model, batch, generator):
        return (model(batch[0]) - batch[1]).square().mean()

    results = []
    for accumulate in (1, 4):
        torch.manual_seed(0)
        config = dataclasses.replace(SHORT, accumulate=accumulate, ema=None, clip_norm=None)
        out = tmp_path / str(accumulate)
        results.append(train(nn.Linear(5, 2), TensorDataset(X, Y), plain, config, out, device="cpu").model)
    for p, q in zip(*(model.state_dict().values() for model in results), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_bfloat16_trains(tmp_path):
    result = fit(tmp_path, dataclasses.replace(SHORT, steps=60, mixed_precision="bf16", learning_rate=3e-2))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert result.loss < 0.7 * lines[0]["loss"]
    assert next(result.model.parameters()).dtype == torch.float32
    assert result.model(X[:2]).dtype == torch.float32


def test_every_pass_visits_every_sample_once():
    config = TrainConfig(steps=25, batch_size=4)
    whole = [index for batch in StepSampler(10, config, 4, 1, 0, 0) for index in batch]
    for first in range(0, 100, 10):
        assert sorted(whole[first : first + 10]) == list(range(10))
    assert whole[:10] != whole[10:20]
    later = [index for batch in StepSampler(10, config, 4, 1, 0, 7) for index in batch]
    assert later == whole[28:]
    shares = [list(StepSampler(10, config, 2, 2, rank, 0)) for rank in (0, 1)]
    assert [a + b for a, b in zip(*shares, strict=True)] == list(StepSampler(10, config, 4, 1, 0, 0))


def test_schedules():
    base = TrainConfig(steps=100, learning_rate=1.0, schedule="constant", warmup=10)
    assert [learning_rate(base, step) for step in (0, 9, 10, 99)] == [0.1, 1.0, 1.0, 1.0]
    cosine = dataclasses.replace(base, schedule="cosine", warmup=0)
    assert learning_rate(cosine, 0) == 1
    assert learning_rate(cosine, 50) == pytest.approx(0.5)
    cycle = dataclasses.replace(cosine, schedule="one-cycle")
    assert learning_rate(cycle, 0) == pytest.approx(0.04)
    assert learning_rate(cycle, 30) == pytest.approx(1.0)
    assert learning_rate(cycle, 99) < 0.01
    assert max(learning_rate(cycle, step) for step in range(100)) <= 1


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(WorkError, match="the loss is nan at step 3"):
        train(build(), TensorDataset(X, Y), lambda m, b, g: m(b[0]).sum() * math.nan, SHORT, tmp_path, device="cpu")


def test_another_configuration_in_the_folder_is_refused(tmp_path):
    fit(tmp_path)
    with pytest.raises(InputError, match="this folder holds another run"):
        fit(tmp_path, dataclasses.replace(SHORT, seed=1))
    changed = fit(tmp_path, dataclasses.replace(SHORT, seed=1), resume=False)
    assert changed.steps == 12


@pytest.mark.parametrize("damage", [lambda data: data[:100], lambda data: b"", lambda data: b"\x80\x04" + data])
def test_a_damaged_checkpoint_is_named(tmp_path, damage):
    fit(tmp_path)
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match=r"checkpoint\.safetensors: damaged checkpoint"):
        fit(tmp_path)


def test_a_checkpoint_of_another_model_is_named(tmp_path):
    fit(tmp_path)
    with pytest.raises(InputError, match="checkpoint of another"):
        train(nn.Linear(5, 2), TensorDataset(X, Y), loss, SHORT, tmp_path, device="cpu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps"),
        ({"steps": 2.5}, "steps"),
        ({"ema": 1.0}, "ema"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"learning_rate": math.inf}, "learning_rate"),
        ({"warmup": -1}, "warmup"),
        ({"clip_norm": math.nan}, "clip_norm"),
        ({"weight_decay": math.nan}, "weight_decay"),
        ({"schedule": "odd"}, "schedule"),
        ({"mixed_precision": "fp8"}, "mixed_precision"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(SHORT, **changes)


def test_batches_must_divide_and_data_must_exist(tmp_path):
    with pytest.raises(InputError, match="a multiple of 3"):
        fit(tmp_path, dataclasses.replace(SHORT, accumulate=3))
    with pytest.raises(InputError, match="no sample"):
        train(build(), TensorDataset(X[:0], Y[:0]), loss, SHORT, tmp_path / "b", device="cpu")
    with pytest.raises(InputError, match="device"):
        train(build(), TensorDataset(X, Y), loss, SHORT, tmp_path / "c", device="tpu")


def test_data_may_be_augmented_with_torchs_generator(tmp_path):
    class Noisy(torch.utils.data.Dataset):
        def __len__(self):
            return len(X)

        def __getitem__(self, index):
            return X[index] + torch.rand(5), Y[index]

    whole = train(build(), Noisy(), loss, SHORT, tmp_path / "whole", device="cpu")
    with pytest.raises(StoppedError):
        train(build(), Noisy(), stopping(6), SHORT, tmp_path / "cut", device="cpu")
    assert equal(train(build(), Noisy(), loss, SHORT, tmp_path / "cut", device="cpu").model, whole.model)


def test_a_checkpoint_belongs_to_its_configuration(tmp_path):
    fit(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(InputError, match="checkpoint of another run"):
        fit(tmp_path, dataclasses.replace(SHORT, seed=1))


def test_a_diverged_state_never_replaces_a_good_checkpoint(tmp_path):
    calls = 0

    def diverging(model, batch, generator):
        nonlocal calls
        calls += 1
        return loss(model, batch, generator) * (math.nan if calls > 4 else 1)

    config = dataclasses.replace(SHORT, checkpoint_every=2, log_every=12)
    with pytest.raises(WorkError, match="at step 6"):
        train(build(), TensorDataset(X, Y), diverging, config, tmp_path, device="cpu")
    resumed = fit(tmp_path, config)
    assert all(torch.isfinite(value).all() for value in resumed.model.state_dict().values())


def test_leftovers_of_killed_writers_are_removed(tmp_path):
    fit(tmp_path)
    (tmp_path / ".checkpoint.safetensors.abcd1234").write_bytes(b"half")
    fit(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint.safetensors",
        "config.json",
        "environment.json",
        "log.jsonl",
    ]


class Twice(Method):
    """Two passes, an own optimiser that moves the last layer slowly, and a counter that the weights depend on."""

    passes = 2

    def __init__(self, die_at: int | None = None) -> None:
        self.count, self.die_at = torch.zeros(()), die_at

    def losses(self, model, batch, generator):
        x, y = batch
        yield (model(x) - y).square().mean()
        noise = torch.randn(x.shape, generator=generator)
        yield self.weight * (model(x + noise) - y).square().mean()

    def begin_step(self, model, step):
        if step == self.die_at:
            raise StoppedError
        self.weight = float(self.count) / 10

    def after_backward(self, model, step):
        self.gradient = model.first.weight.grad.norm()

    def after_step(self, model, step):
        self.count += 1
        return {"gradient": self.gradient, "count": float(self.count)}

    def optimizer(self, model, config):
        groups = [{"params": model.first.parameters()}, {"params": model.last.parameters(), "lr_scale": 0.0}]
        return torch.optim.SGD(groups, lr=config.learning_rate, momentum=0.9)

    def state(self):
        return {"count": self.count}

    def load_state(self, tensors):
        self.count = tensors["count"]


@pytest.mark.parametrize("at", [1, 4, 5, 7, 11])
def test_a_method_with_state_goes_on_to_the_same_bits(tmp_path, at):
    def run(name, method):
        return train(build(), TensorDataset(X, Y), method, SHORT, tmp_path / name, device="cpu")

    whole = run("whole", Twice())
    with pytest.raises(StoppedError):
        run("cut", Twice(at))
    assert equal(whole.model, run("cut", Twice()).model)
    for name in ("log.jsonl", "checkpoint.safetensors"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    lines = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert [line["count"] for line in lines] == [3, 6, 9, 12]
    assert all(line["gradient"] > 0 for line in lines)
    start = build()
    assert torch.equal(whole.model.last.weight, start.last.weight)  # its rate is scaled by 0
    assert not torch.equal(whole.model.first.weight, start.first.weight)


def test_the_passes_of_a_method_add_up(tmp_path):
    class Halves(Method):
        passes = 2

        def losses(self, model, batch, generator):
            for _ in range(2):
                yield (model(batch[0]) - batch[1]).square().mean() / 2

    def plain(model, batch, generator):
        return (model(batch[0]) - batch[1]).square().mean()

    results = []
    for method in (plain, Halves()):
        torch.manual_seed(0)
        out = tmp_path / str(len(results))
        results.append(train(nn.Linear(5, 2), TensorDataset(X, Y), method, SHORT, out, device="cpu").model)
    torch.testing.assert_close(results[0].weight, results[1].weight, rtol=1e-5, atol=1e-6)

    class Three(Halves):
        passes = 1

    with pytest.raises(RuntimeError, match="more than its 1 passes"):
        train(nn.Linear(5, 2), TensorDataset(X, Y), Three(), SHORT, tmp_path / "3", device="cpu")


def test_stochastic_gradient_descent_is_that_of_torch(tmp_path):
    config = TrainConfig(
        steps=5,
        batch_size=50,
        learning_rate=0.1,
        optimizer="sgd",
        nesterov=True,
        weight_decay=0.01,
        schedule="steps",
        milestones=(2, 4),
        clip_norm=None,
        clip_value=0.05,
    )
    torch.manual_seed(0)
    model, twin = nn.Linear(5, 2, bias=False), nn.Linear(5, 2, bias=False)
    twin.load_state_dict(model.state_dict())
    dataset = TensorDataset(X, Y)
    train(model, dataset, lambda m, b, g: (m(b[0]) - b[1]).square().mean(), config, tmp_path, device="cpu")
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01)
    for step in range(5):
        optimizer.param_groups[0]["lr"] = [0.1, 0.1, 0.01, 0.01, 0.001][step]
        optimizer.zero_grad()
        (twin(X) - Y).square().mean().backward()
        nn.utils.clip_grad_value_(twin.parameters(), 0.05)
        optimizer.step()
    torch.testing.assert_close(model.weight, twin.weight, rtol=1e-5, atol=1e-6)


def test_the_cosine_ends_where_it_is_told():
    config = TrainConfig(steps=10, learning_rate=1.0, final_learning_rate=0.2)
    assert learning_rate(config, 0) == 1
    assert learning_rate(config, 10) == pytest.approx(0.2)
