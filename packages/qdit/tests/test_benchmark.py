"""`qdit benchmark`, and when layers take integer products."""

import copy
import json

import pytest
import qdit.benchmark
import torch
from papercore import cli as commands
from papercore.gpu import Request
from papercore.quant import Parameters, choose_parameters
from qdit.cli import COMMANDS
from qdit.gpu_tasks import benchmark_linear
from qdit.layers import LayerSpec, QuantLinear, integer_wins


def run(*arguments: object) -> int:
    return commands.main("qdit", COMMANDS, "", [str(argument) for argument in arguments])


SMALL = ("benchmark", "--shapes", "24x40", "16x8", "--tokens", "3", "--repeats", "2")


def test_every_way_is_timed(tmp_path, capsys, monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setattr(qdit.benchmark, "installed", lambda module: None)
    assert run(*SMALL, "--groups", "16", "32", "--out", tmp_path / "raw.json", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    methods = [row["method"] for row in result["table"] if row["layer"] == "24x40"]
    integers = ["integer, groups of 16", "integer, groups of 32", "integer, row-wise"]
    assert methods == ["float32", "bfloat16", "simulation", *integers]
    assert [row["method"] for row in result["table"] if row["layer"] == "16x8"][3:] == ["integer, row-wise"]
    raw = json.loads((tmp_path / "raw.json").read_text())
    assert {len(times) for layer in raw["milliseconds"].values() for times in layer.values()} == {2}
    assert torch.get_num_threads() == threads
    assert run(*SMALL) == 0
    assert "auto simulates" in " ".join(capsys.readouterr().out.split())


def test_lines_that_lose_say_so():
    times = {"float32": [2.0], "bfloat16": [1.0], "simulation": [3.0], "integer, groups of 8": [2.5]}
    remarks = {line[1]: line[5] for line in qdit.benchmark.table_rows("16x64", 4, times)}
    assert remarks == {
        "float32": "",
        "bfloat16": "",
        "simulation": "loses to float32, bfloat16",
        "integer, groups of 8": "loses to float32, bfloat16; auto simulates",
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--shapes", "24"), "--shapes: found 24"),
        (("--shapes", "0x4"), "--shapes: found 0x4"),
        (("--tokens", "0"), "--tokens: found 0"),
        (("--threads", "0"), "--threads: found 0"),
        (("--groups", "0"), "--groups: found 0"),
        (("--wbits", "9"), "--wbits: found 9"),
    ],
)
def test_wrong_options(arguments, message, capsys):
    assert run(*SMALL[:1], "--repeats", "1", *arguments) == 2
    assert message in capsys.readouterr().err


def layer(rows: int, columns: int, size: int, **changes) -> QuantLinear:
    fields = {"wbits": 4, "abits": 8, "w_sym": False, "a_sym": False, "act": "dynamic", "act_granularity": "token"}
    made = QuantLinear(
        rows, columns, bias=True, spec=LayerSpec(**(fields | changes), group_size=size, scale_dtype="float16")
    )
    made.round_to_nearest(torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)))
    return made


def test_auto_takes_integers_only_where_they_were_measured_to_win(monkeypatch):
    monkeypatch.setattr("qdit.layers.has_fast_integers", lambda: True)
    x = torch.zeros(64, 1152)
    assert integer_wins(x, 1152, 1152, 64)
    assert not integer_wins(x, 1152, 1152, 32)
    assert not integer_wins(x, 64, 1152, 64)
    assert not integer_wins(x[:63], 1152, 1152, 64)
    assert not integer_wins(x.bfloat16(), 1152, 1152, 64)
    assert not integer_wins(x.to("meta"), 1152, 1152, 64)
    monkeypatch.setattr("qdit.layers.has_fast_integers", lambda: False)
    assert not integer_wins(x, 1152, 1152, 64)
    small = layer(6, 8, 4)
    small.backend = "auto"
    small(torch.randn(2, 8))
    assert small._prepared is None


def test_the_prepared_weight_follows_the_weight():
    one = layer(6, 10, 4)
    one.backend = "integer"
    x = torch.randn(3, 10, generator=torch.Generator().manual_seed(1))
    before = one(x)
    assert one._prepared is not None
    assert set(one.state_dict()) == {"qweight", "scale", "zero", "bias"}
    twin = copy.deepcopy(one)
    assert twin._prepared is None
    assert torch.equal(twin(x), before)
    other = layer(6, 10, 4)
    other.round_to_nearest(torch.ones(6, 10))
    twin.load_state_dict(other.state_dict())
    other.backend = "integer"
    assert torch.equal(twin(x), other(x))
    one.round_to_nearest(torch.ones(6, 10))
    assert torch.equal(one(x), other(x))


@pytest.mark.parametrize("granularity", ["token", "sample", "tensor"])
@pytest.mark.parametrize("act", ["dynamic", "static"])
@pytest.mark.parametrize("shape", [(0, 3, 10), (1, 1, 10), (2, 3, 10)])
def test_integers_equal_the_simulation_whatever_shares_a_range(granularity, act, shape):
    one = layer(6, 10, 4, act=act, act_granularity=granularity, wbits=8)
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(2))
    if act == "static":
        ranges = choose_parameters(torch.linspace(-2, 2, 10)[None], 8, 4)
        one.set_static_range(Parameters(ranges.scale[0], ranges.zero[0]))
    expected = one(x)
    one.backend = "integer"
    assert one(x).shape == expected.shape
    assert (one(x) - expected).norm() <= 1e-6 * expected.norm()
    if len(x) == 2 and act == "static":
        x[1, 2, 3] = torch.nan
        y = one(x)
        assert y[1, 2].isnan().all()
        assert y[0].isfinite().all()


def test_the_gpu_benchmark_runs_at_tiny_size(monkeypatch):
    monkeypatch.setattr(qdit.benchmark, "installed", lambda module: None)
    monkeypatch.setattr("qdit.gpu_tasks.milliseconds", lambda work, device: float(work().numel()))
    record = benchmark_linear(Request("cpu", True, None))
    names = set(record["results"][0]["milliseconds"])
    assert {"dense", "W8A8, row-wise", "W4A8, groups of 16", "torchao int8 dynamic", "float8 row-wise"} <= names
